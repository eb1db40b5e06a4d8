"""Import of LoMDM: heads under names that nobody has published are found, asked for or refused, and never guessed."""

import json
import re

import pytest
import torch
from tiny_mdlm import text, tiny_lomdm
from transformers import AutoModelForMaskedLM

from hf_diffusion import LoMDMForMaskedDiffusion
from hf_diffusion.cli import main
from hf_diffusion.conversion import (
    CheckpointError,
    convert_lomdm_checkpoint,
    load_lomdm_checkpoint,
    load_mdlm_checkpoint,
)


BACKBONE = {
    "model.embed_tokens.weight": "vocab_embed.embedding",
    "model.noise_embedding.in_proj": "sigma_map.mlp.0",
    "model.noise_embedding.out_proj": "sigma_map.mlp.2",
    "model.layers": "blocks",
    "input_layernorm": "norm1",
    "self_attn.qkv": "attn_qkv",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "norm2",
    "mlp.up_proj": "mlp.0",
    "mlp.down_proj": "mlp.2",
    ".modulation": ".adaLN_modulation",
    "model.norm": "output_layer.norm_final",
    "lm_head": "output_layer.linear",
    "model.final_shift_scale": "output_layer.adaLN_modulation",
}
"""Ours and the MDLM repository's."""

MODULES = {
    "layer.input_layernorm": "block.norm1",
    "layer.self_attn.qkv": "block.attn_qkv",
    "layer.self_attn.o_proj": "block.attn_out",
    "layer.post_attention_layernorm": "block.norm2",
    "layer.mlp.up_proj": "block.mlp.0",
    "layer.mlp.down_proj": "block.mlp.2",
    "norm": "mlp.0",
    "in_proj": "mlp.1",
    "out_proj": "mlp.3",
}
"""Names that a fork may well have given to the modules of a head: those of MDLM's layer, and a `Sequential`."""

SEPARATE = {f"layer.self_attn.{letter}_proj": f"block.attn.{letter}_proj" for letter in "qkv"}
UNTOLD_NORMS = {"layer.input_layernorm": "ln_a", "layer.post_attention_layernorm": "ln_b", "norm": "ln_c"}
HEADS = ("forward_scheduler", "reverse_scheduler")


def fused(state):
    """Queries, keys and values as one tensor."""
    result = {}
    for name, tensor in state.items():
        if ".q_proj" in name:
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            result[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif not re.search("[kv]_proj", name):
            result[name] = tensor
    return result


def state_dict_of(model, heads, modules=MODULES):
    """The weights of a LoMDM in a file whose names of modules in the two heads are made by the patterns `heads`."""
    state = model.state_dict()
    result = {}
    for name, tensor in fused({name: tensor for name, tensor in state.items() if "_scheduler" not in name}).items():
        for ours, theirs in BACKBONE.items():
            name = name.replace(ours, theirs)
        result[f"backbone.{name}"] = tensor.clone()
    for head, pattern in zip(HEADS, heads, strict=True):
        own = {name.removeprefix(f"{head}."): tensor for name, tensor in state.items() if name.startswith(head)}
        for name, tensor in (own if SEPARATE.keys() <= modules.keys() else fused(own)).items():
            module, _, parameter = name.rpartition(".")
            result[f"{pattern.format(modules[module])}.{parameter}"] = tensor.clone()
    return result


def content_of(model, *naming, first="forward"):
    """What training leaves: raw weights beside averaged ones, which are those of `model`."""
    averaged = state_dict_of(model, *naming)
    if first == "reverse":
        averaged = dict(reversed(averaged.items()))
    raw = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in averaged.items()}
    raw["backbone.rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    sizes = {"hidden_size": 16, "n_heads": 2, "length": 32, "n_blocks": 3, "dropout": 0.0}
    config = {"model": sizes, "parameterization": "subs", "time_conditioning": False, "algo": {"c1": 0.8, "c2": 0.6}}
    config["training"] = {"sampling_eps": 0.01, "importance_sampling": True}  # the latter of MDLM's objective only
    return {
        "state_dict": raw,
        "ema": {"shadow_params": list(averaged.values()), "decay": 0.9999},
        "hyper_parameters": {"config": config},
        "global_step": 5,
    }


@pytest.fixture
def model():
    return tiny_lomdm(torch.float32, c1=0.8, c2=0.6)


@pytest.fixture
def load(tmp_path):
    def save_and_load(content, **settings):
        torch.save(content, tmp_path / "saved.ckpt")
        return load_lomdm_checkpoint(tmp_path / "saved.ckpt", **{"mask_token_id": 11, **settings})

    return save_and_load


def assert_same(found, expected):
    """The same weights, and the same numbers from the backbone and from both heads."""
    state, expected_state = found.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)
    ids = text(2, 9, masked=0.5)
    with torch.no_grad():
        mine, other = found(ids), expected(ids)
        forward = [one.forward_exponents(ids) for one in (found, expected)]
    torch.testing.assert_close(mine.logits, other.logits, rtol=0, atol=1e-4)  # sums depend on where memory begins
    torch.testing.assert_close(mine.exponents, other.exponents, rtol=0, atol=1e-5)
    torch.testing.assert_close(*forward, rtol=0, atol=1e-5)
    assert (forward[0] - mine.exponents).abs().max() > 0.1  # the heads are not alike


RECOGNISED = {
    "modules of their own": (("phi.{}", "psi.{}"), MODULES),
    "in the backbone": (("backbone.forward_head.{}", "backbone.reverse_head.{}"), MODULES),
    "no modules": (("backbone.q_{}", "backbone.p_{}"), {ours: name.split(".", 1)[1] for ours, name in MODULES.items()}),
    "in a dict": (("schedulers.posterior.{}", "schedulers.prior.{}"), MODULES),
    "two words": (("forward_phi.{}", "backward_psi.{}"), MODULES),
    "our names": (("net.forward.{}", "net.backward.{}"), {**MODULES, **SEPARATE}),
}
RECOGNISED["no modules"][1]["norm"] = "ln"


class TestRecognised:
    @pytest.mark.parametrize("first", ["forward", "reverse"])
    @pytest.mark.parametrize("naming", RECOGNISED)
    def test_names_and_shapes_suffice(self, model, load, naming, first):
        found, info = load(content_of(model, *RECOGNISED[naming], first=first))
        assert type(found) is LoMDMForMaskedDiffusion and not found.training
        assert_same(found, model)
        assert (found.config.c1, found.config.c2, found.config.least_time) == (0.8, 0.6, 0.01)
        assert (info.weights, info.training_steps) == ("averaged", 5)

    def test_what_was_matched_is_reported(self, model, load):
        matched = load(content_of(model, *RECOGNISED["modules of their own"])).info.matched
        assert set(matched) == {name for name in model.state_dict() if "_scheduler" in name}
        assert matched["forward_scheduler.norm.weight"] == "phi.mlp.0.weight"
        assert matched["reverse_scheduler.layer.self_attn.k_proj.weight"] == "psi.block.attn_qkv.weight[16:32]"

    def test_raw_weights_on_request(self, model, load):
        content = content_of(model, *RECOGNISED["modules of their own"])
        raw, info = load(content, use_ema=False)
        assert torch.equal(raw.reverse_scheduler.norm.weight, content["state_dict"]["psi.mlp.0.weight"])
        assert torch.equal(raw.model.norm.weight, content["state_dict"]["backbone.output_layer.norm_final.weight"])
        assert info.weights == "raw"

    def test_compiled_files_and_rotary_buffers_of_heads(self, model, load):
        content = content_of(model, *RECOGNISED["modules of their own"])
        raw = content["state_dict"]
        content["state_dict"] = {re.sub("^(phi|psi|backbone)", r"\1._orig_mod", name): raw[name] for name in raw}
        content["state_dict"]["phi.rotary_emb.inv_freq"] = raw["backbone.rotary_emb.inv_freq"].clone()
        assert_same(load(content).model, model)


def mapping_of(naming, ours=lambda name: True):
    """The mapping that says all, from the patterns and names that a file was written with."""
    (patterns, modules), mapping = naming, {}
    names = [name for name in tiny_lomdm().state_dict() if "_scheduler" in name and ours(name)]
    for name in names:
        head, _, rest = name.partition(".")
        module, _, parameter = rest.rpartition(".")
        pattern = patterns[HEADS.index(head)]
        if module in modules:
            mapping[name] = f"{pattern.format(modules[module])}.{parameter}"
        else:
            start = 16 * "qkv".index(module[-6])
            fused_name = f"{pattern.format(modules['layer.self_attn.qkv'])}.{parameter}"
            mapping[name] = {"name": fused_name, "rows": [start, start + 16]}
    return mapping


def is_norm(name):
    return "norm" in name


NUMBERED = (("heads.0.{}", "heads.1.{}"), MODULES)
AMBIGUOUS = {
    "heads without a word": (NUMBERED, lambda name: True, "which scheduler head is the forward one"),
    "heads without a word, one said": (NUMBERED, lambda name: name.startswith(HEADS[0]), "which scheduler head"),
    "words that contradict": ((("q_reverse.{}", "p_forward.{}"), MODULES), lambda name: True, "which scheduler head"),
    "a word that also names queries": (
        (("q.{}", "p.{}"), {**MODULES, **SEPARATE}),
        lambda name: True,
        "which scheduler head",
    ),
    "norms without names": ((("phi.{}", "psi.{}"), {**MODULES, **UNTOLD_NORMS}), is_norm, "which parameter"),
    "a name twice": ((("phi.{}", "psi.{}"), {**MODULES, "norm": "mlp.norm1"}), is_norm, "which parameter"),
}


class TestAmbiguous:
    @pytest.mark.parametrize("case", AMBIGUOUS)
    def test_it_is_listed_and_a_mapping_cures_it(self, model, load, case):
        naming, unclear, message = AMBIGUOUS[case]
        content = content_of(model, *naming)
        with pytest.raises(CheckpointError, match="saved.ckpt: names and shapes do not say") as caught:
            load(content)
        assert message in str(caught.value) and "Say it by `mapping`" in str(caught.value)
        mapping = mapping_of(naming, unclear)
        if case != "a name twice":  # of the three norms, one is still clear
            for ours, theirs in mapping.items():
                theirs = theirs if isinstance(theirs, str) else theirs["name"]
                assert f"\n  {ours} {tuple(model.get_parameter(ours).shape)}\n" in str(caught.value)
                assert f"\n  {theirs} {tuple(content['state_dict'][theirs].shape)}\n" in str(caught.value)
        found, info = load(content, mapping=mapping)
        assert_same(found, model)
        assert not info.matched.keys() & mapping.keys()

    def test_the_mapping_counts_before_names(self, model, load):
        naming = (("phi.{}", "psi.{}"), MODULES)
        swapped = ({"phi": "psi", "psi": "phi"}[name[:3]] + name[3:] for name in ("phi.{}", "psi.{}"))
        found = load(content_of(model, *naming), mapping=mapping_of((tuple(swapped), MODULES))).model
        assert torch.equal(found.forward_scheduler.norm.weight, model.reverse_scheduler.norm.weight)


NAMING = (("phi.{}", "psi.{}"), MODULES)
KEY = "forward_scheduler.layer.self_attn.k_proj.weight"


class TestDamagedMapping:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {KEY: "phi.block.attn_k.weight"},
                "names `phi.block.attn_k.weight`, but besides its backbone, it holds no",
            ),
            ({"forward_scheduler.norm.bias": "phi.mlp.1.bias"}, "no parameter of this name. Did you mean `forward_sch"),
            ({KEY: "phi.block.attn_qkv.weight"}, r"qkv.weight`, .48, 16., for `.*k_proj.weight`, which is .16, 16."),
            ({KEY: {"name": "phi.block.attn_qkv.weight", "rows": [16, 30]}}, r"which is .16, 16."),
            ({KEY: {"name": "phi.block.attn_qkv.weight", "rows": [40, 56]}}, r"40:56.* tensor has the shape .48, 16."),
            (
                {KEY: {"name": "phi.block.attn_qkv.weight", "rows": [0, 16]}},
                "uses `phi.block.attn_qkv.weight` more than",
            ),
            ({"forward_scheduler.in_proj.bias": "phi.block.mlp.2.bias"}, "uses `phi.block.mlp.2.bias` more than once"),
            ({"reverse_scheduler.norm.weight": "phi.mlp.0.weight"}, "uses `phi.mlp.0.weight` more than once"),
        ],
    )
    def test_the_error_says_which(self, model, load, change, message):
        with pytest.raises(CheckpointError, match=f"saved.ckpt: `mapping` .*{message}"):
            load(content_of(model, *NAMING), mapping=mapping_of(NAMING) | change)

    def test_a_tensor_used_in_part(self, model, load):
        only_keys = {KEY: mapping_of(NAMING)[KEY]}
        with pytest.raises(CheckpointError, match="`mapping` uses `phi.block.attn_qkv.weight` only in part"):
            load(content_of(model, *NAMING), mapping=only_keys)

    def test_a_parameter_without_a_source(self, model, load):
        mapping = mapping_of(NUMBERED)
        names = [f"{head}.out_proj.bias" for head in HEADS]
        for name in names:
            del mapping[name]
        with pytest.raises(CheckpointError, match=f"without a tensor:\n  {names[0]} .1,.\n  {names[1]} .1,.\n"):
            load(content_of(model, *NUMBERED), mapping=mapping)

    @pytest.mark.parametrize(
        "mapping", [["phi"], {KEY: 3}, {KEY: {"name": "phi"}}, {KEY: {"name": 1, "rows": [0, 1]}}, {KEY: {"rows": 1}}]
    )
    def test_another_form_is_refused_before_the_file_is_read(self, tmp_path, mapping):
        with pytest.raises(ValueError, match="`mapping` .* must be"):
            load_lomdm_checkpoint(tmp_path / "not there", mapping=mapping)


def add(**tensors):
    return lambda content: content["state_dict"].update(tensors)


def remove(*names):
    return lambda content: [content["state_dict"].pop(name) for name in names]


class TestOtherNetworks:
    @pytest.mark.parametrize(
        ("change", "listed"),
        [
            (
                remove("phi.mlp.0.weight", "psi.mlp.0.weight"),
                "without a tensor:\n  forward_scheduler.norm.weight .16,.",
            ),
            (add(**{"phi.mlp.0.bias": torch.zeros(16)}), "  phi.mlp.0.bias .16,."),
            (
                add(**{"psi.block.adaLN_modulation.bias": torch.zeros(96)}),
                "parameter:\n  psi.block.adaLN_modulation.bias",
            ),
            (add(temperature=torch.ones(())), "parameter:.*\n  temperature .."),
        ],
        ids=["no norm", "a bias", "modulation", "no head's"],
    )
    def test_other_heads_are_refused_with_the_reason(self, model, load, change, listed):
        content = content_of(model, *NAMING)
        change(content)
        with pytest.raises(CheckpointError, match="heads are of another network than ours") as caught:
            load(content, use_ema=False)
        assert re.search(listed, str(caught.value), re.DOTALL) and "no `mapping` helps" in str(caught.value)

    def test_a_bias_elsewhere_does_not_mislead(self, model, load):
        """By shapes alone, the map behind attention would be the MLP's, and the other way round."""
        content = content_of(model, *NAMING)
        for head in ("phi", "psi"):
            content["state_dict"][f"{head}.block.attn_out.bias"] = content["state_dict"].pop(f"{head}.mlp.1.bias")
        with pytest.raises(CheckpointError, match="do not say which tensor of its scheduler heads is which parameter"):
            load(content, use_ema=False)

    def test_other_rotary_positions(self, model, load):
        content = content_of(model, *NAMING)
        content["state_dict"]["phi.rotary_emb.inv_freq"] = torch.ones(4)
        with pytest.raises(CheckpointError, match="rotary frequencies .* are not those of 2 heads in a width of 16"):
            load(content)

    def test_files_of_mdlm_and_for_mdlm(self, model, load, tmp_path):
        content = content_of(model, *NAMING)
        torch.save(content, tmp_path / "lomdm.ckpt")
        with pytest.raises(
            CheckpointError, match="holds `phi.block.norm1.weight`, .*`hf-diffusion convert lomdm` reads"
        ):
            load_mdlm_checkpoint(tmp_path / "lomdm.ckpt", mask_token_id=11)
        for name in [name for name in content["state_dict"] if name.startswith(("phi", "psi"))]:
            del content["state_dict"][name]
        with pytest.raises(CheckpointError, match="no scheduler heads. .*`hf-diffusion convert mdlm` reads"):
            load(content)

    def test_another_backbone(self, model, load):
        content = content_of(model, *NAMING)
        del content["state_dict"]["backbone.blocks.1.norm1.weight"]
        with pytest.raises(CheckpointError, match="it lacks `blocks.1.norm1.weight`"):
            load(content)
        content = content_of(model, *NAMING)
        content["state_dict"] = {n: tensor for n, tensor in content["state_dict"].items() if "sigma_map" not in n}
        with pytest.raises(CheckpointError, match="it lacks `backbone.sigma_map`"):
            load(content)


class TestAveragedWeights:
    def test_heads_in_another_order_are_noticed(self, model, load):
        content = content_of(model, *NAMING)
        names = [name for name in content["state_dict"] if not name.endswith("inv_freq")]
        averaged = dict(zip(names, content["ema"]["shadow_params"], strict=True))
        other = {"phi": "psi", "psi": "phi"}
        content["ema"]["shadow_params"] = [averaged[other.get(name[:3], name[:3]) + name[3:]] for name in names]
        with pytest.raises(CheckpointError, match="closer to the raw ones of the other head"):
            load(content)
        load(content, use_ema=False)

    def test_a_raw_weight_that_is_not_finite_does_not_hide_the_order(self, model, load):
        content = content_of(model, *NAMING)
        content["state_dict"]["psi.mlp.1.weight"][2, 3] = float("nan")
        with pytest.raises(
            CheckpointError, match="saved.ckpt: its raw weight `psi.mlp.1.weight` holds NaN or infinity"
        ):
            load(content)

    def test_an_average_of_the_backbone_alone(self, model, load):
        content = content_of(model, *NAMING)
        del content["ema"]["shadow_params"][-20:]
        count = len(content["state_dict"]) - 1
        with pytest.raises(
            CheckpointError, match=f"holds {count - 20} averaged .* for {count} parameters.*`use_ema=Fal"
        ):
            load(content)


class TestSettings:
    def test_exponents_that_the_file_does_not_say(self, model, load):
        content = content_of(model, *NAMING)
        content["hyper_parameters"]["config"]["algo"] = {"c1": "${scheduler.c1}"}
        with pytest.raises(CheckpointError, match="it does not say `c1`, `c2`. Pass them by name"):
            load(content)
        assert_same(load(content, c1=0.8, c2=0.6).model, model)

    def test_exponents_that_it_says_twice(self, model, load):
        content = content_of(model, *NAMING)
        content["hyper_parameters"]["config"]["noise"] = {"type": "learned", "c1": 0.8, "c2": 0.5}
        with pytest.raises(CheckpointError, match="it does not say `c2`. Pass it by name"):
            load(content)
        assert_same(load(content, c2=0.6).model, model)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"c2": 0.8}, "`c2` .0.8. must be at least 0 and less than `c1` .0.8."),
            ({"time_conditioning": True}, "`time_conditioning`=True does not go with LoMDM"),
            ({"noise_schedule": "cosine"}, "`noise_schedule`=.* does not go with LoMDM: the schedule is learned"),
            ({"c3": 1}, "`c3` is not a setting of LoMDM .value 1.. See `LoMDMConfig`"),
        ],
    )
    def test_what_does_not_go_with_it(self, model, load, settings, message):
        with pytest.raises(ValueError, match=message):
            load(content_of(model, *NAMING), **settings)


class TestCommand:
    def test_writes_a_folder_that_loads_and_says_what_it_matched(self, model, tmp_path, capsys):
        torch.save(content_of(model, *NAMING), tmp_path / "lomdm.ckpt")
        output = tmp_path / "model"
        command = ["convert", "lomdm", str(tmp_path / "lomdm.ckpt"), str(output), "--mask-token-id", "11"]
        assert main([*command, "--c1", "0.9", "--c2", "0.2"]) == 0
        printed = capsys.readouterr().out
        assert (
            "found by name and shape" in printed and "  reverse_scheduler.norm.weight = psi.mlp.0.weight\n" in printed
        )
        found = AutoModelForMaskedLM.from_pretrained(output)
        assert type(found) is LoMDMForMaskedDiffusion and (found.config.c1, found.config.c2) == (0.9, 0.2)
        state = found.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())

    def test_a_mapping_file(self, model, tmp_path, capsys):
        torch.save(content_of(model, *NUMBERED), tmp_path / "lomdm.ckpt")
        output, mapping = tmp_path / "new" / "model", tmp_path / "mapping.json"
        command = ["convert", "lomdm", str(tmp_path / "lomdm.ckpt"), str(output), "--mask-token-id", "11"]
        assert main(command) == 2
        assert "heads.1.block.attn_qkv.weight (48, 16)" in capsys.readouterr().err
        mapping.write_text("{phi}")
        assert main([*command, "--mapping", str(mapping)]) == 2
        assert "mapping.json: it is not JSON" in capsys.readouterr().err
        assert not output.parent.exists()
        mapping.write_text(json.dumps(mapping_of(NUMBERED)))
        assert main([*command, "--mapping", str(mapping)]) == 0
        assert "found by name" not in capsys.readouterr().out
        assert_same(AutoModelForMaskedLM.from_pretrained(output), model)
        assert list(output.parent.iterdir()) == [output]
        command[1] = "mdlm"
        command[3] = str(tmp_path / "other")
        assert main([*command, "--mapping", str(mapping)]) == 2
        assert "`mapping` is not a setting of MDLM" in capsys.readouterr().err

    def test_a_malicious_file_runs_and_writes_nothing(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save({"state_dict": {"phi.norm1.weight": Payload()}}, tmp_path / "evil.ckpt")
        with pytest.raises(CheckpointError, match="holds `phi.norm1.weight`, which is no tensor"):
            convert_lomdm_checkpoint(tmp_path / "evil.ckpt", tmp_path / "new" / "model")
        assert [file.name for file in tmp_path.iterdir()] == ["evil.ckpt"]
