"""Import of the reference's checkpoints: its numbers from good files, and a precise error from every other."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_diffusion import MDLMForMaskedDiffusion
from hf_diffusion.cli import main
from hf_diffusion.conversion import (
    CheckpointError,
    convert_mdlm_checkpoint,
    load_lomdm_checkpoint,
    load_mdlm_checkpoint,
    read_checkpoint,
)
from hf_diffusion.conversion.checkpoint_reader import to_plain
from hf_diffusion.diffusion.masking import NoisedText


VARIANTS = ("subs", "subs_tc", "subs_bertmask")


@pytest.fixture
def golden(shared):
    return shared / "golden/mdlm"


@pytest.fixture
def checkpoint(golden):
    """The content of a genuine file, to be spoilt."""
    content = read_checkpoint(golden / "subs/ref.ckpt")
    tensors = {name: tensor.detach().clone() for name, tensor in content["state_dict"].items()}
    config = to_plain(content["hyper_parameters"]["config"])
    averaged = [tensor.detach().clone() for tensor in content["ema"]["shadow_params"]]
    return {
        "state_dict": tensors,
        "ema": {"shadow_params": averaged, "decay": 0.9999, "num_updates": 5},
        "hyper_parameters": {"config": config},
        "global_step": 5,
    }


@pytest.fixture
def load(tmp_path):
    def save_and_load(content, **settings):
        torch.save(content, tmp_path / "saved.ckpt")
        return load_mdlm_checkpoint(tmp_path / "saved.ckpt", **settings)

    return save_and_load


def settings_of(variant):
    return {"mask_token_id": 7} if variant == "subs_bertmask" else {}


def logits_of(model, tensors):
    noise = {"sigma": tensors["sigma"]} if model.config.time_conditioning else {}
    return model.lm_head(model.model(tensors["xt"], **noise).last_hidden_state)


class TestGenuineFiles:
    @pytest.mark.parametrize(("weights", "use_ema"), [("ema", True), ("raw", False)])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_reference_numbers(self, golden, variant, weights, use_ema):
        expected = load_file(golden / variant / "golden.safetensors")
        model, info = load_mdlm_checkpoint(
            golden / variant / "ref.ckpt", use_ema, attend_to_padding=True, **settings_of(variant)
        )
        assert type(model) is MDLMForMaskedDiffusion and not model.training
        assert (logits_of(model, expected) - expected[f"{weights}.logits"]).abs().max() < 2e-5
        other = {"ema": "raw", "raw": "ema"}[weights]
        assert (logits_of(model, expected) - expected[f"{other}.logits"]).abs().max() > 0.05
        labels = expected["x0"].masked_fill(expected["attention_mask"] == 0, -100)
        torch.manual_seed(31)
        loss = model(expected["x0"], expected["attention_mask"], labels=labels).loss
        torch.testing.assert_close(loss, expected[f"{weights}.seeded.loss"], rtol=1e-5, atol=0)
        noised = NoisedText(expected["xt"], 1 / expected["t"][:, None], expected["sigma"][:, None])
        loss = model(expected["x0"], expected["attention_mask"], labels=labels, noised=noised).loss
        torch.testing.assert_close(loss, expected[f"{weights}.fixed.loss"], rtol=1e-5, atol=0)
        assert (info.weights, info.tokenizer) == ({"ema": "averaged", "raw": "raw"}[weights], "gpt2")
        assert info.training_steps == 5

    @pytest.mark.parametrize("variant", ["subs", "subs_tc"])
    def test_settings_come_from_the_file(self, golden, variant):
        config = load_mdlm_checkpoint(golden / variant / "ref.ckpt").model.config
        facts = json.loads((golden / variant / "golden.json").read_text())
        assert config.mask_token_id == facts["mask_index"]
        assert config.time_conditioning is facts["time_conditioning"]
        assert (config.num_attention_heads, config.max_position_embeddings, config.residual_dropout) == (2, 16, 0.1)
        assert config.noise_schedule == {"type": "loglinear", "epsilon": 1e-3}

    def test_a_mask_token_inside_the_vocabulary_is_asked_for(self, golden):
        with pytest.raises(CheckpointError, match="ref.ckpt: it does not say `mask_token_id`. Pass it by name"):
            load_mdlm_checkpoint(golden / "subs_bertmask/ref.ckpt")

    def test_weights_outlive_the_file(self, golden, tmp_path):
        file = tmp_path / "copy.ckpt"
        file.write_bytes((golden / "subs/ref.ckpt").read_bytes())
        model = load_mdlm_checkpoint(file).model
        file.write_bytes(bytes(file.stat().st_size))
        expected = load_file(golden / "subs/golden.safetensors")
        assert (logits_of(model, expected) - expected["ema.logits"]).abs().max() < 2e-5


class TestVariations:
    def test_objective_of_the_hyper_parameters(self, checkpoint, load):
        config = checkpoint["hyper_parameters"]["config"]
        config["noise"] = {"type": "cosinesqr"}
        config["training"] |= {"importance_sampling": True, "antithetic_sampling": False, "sampling_eps": 0.01}
        imported = load(checkpoint, mask_token_id=31).model.config
        assert imported.noise_schedule["type"] == "cosine_squared"
        assert (imported.time_law, imported.least_time, imported.low_discrepancy) == ("importance", 0.01, False)
        config["T"] = 100
        config["noise"] = {"type": "geometric", "sigma_min": 0.001, "sigma_max": 9}
        imported = load(checkpoint, mask_token_id=31).model.config
        assert imported.noise_schedule == {"type": "geometric", "sigma_min": 0.001, "sigma_max": 9}
        assert (imported.time_law, imported.num_timesteps) == ("uniform", 100)

    def test_compiled_and_distilled_files(self, checkpoint, load, golden):
        plain = checkpoint["state_dict"]
        renamed = {name.replace("backbone.", "backbone._orig_mod."): tensor for name, tensor in plain.items()}
        teacher = {f"teacher.{name}": torch.zeros_like(tensor) for name, tensor in plain.items()}
        model = load({**checkpoint, "state_dict": {**renamed, **teacher}}, mask_token_id=31).model
        expected = load_file(golden / "subs/golden.safetensors")
        assert (logits_of(model, expected) - expected["ema.logits"]).abs().max() < 2e-5

    def test_a_file_without_hyper_parameters_asks_for_them(self, checkpoint, load):
        del checkpoint["hyper_parameters"]
        names = "`max_position_embeddings`, `mask_token_id`, `time_conditioning`, `parameterization` .'subs' for MDLM."
        with pytest.raises(CheckpointError, match=f"it does not say {names}. Pass them by name"):
            load(checkpoint)
        said = {"mask_token_id": 31, "time_conditioning": False, "parameterization": "subs"}
        model = load(checkpoint, model_length=16, **said).model
        assert (model.config.num_attention_heads, model.config.max_position_embeddings) == (2, 16)

    @pytest.mark.parametrize(("mask_token", "expected"), [("[MASK]", 5), (None, 31)])
    def test_the_mask_token_of_a_pickled_tokenizer(self, checkpoint, load, mask_token, expected):
        words = {f"w{index}": index for index in range(32 if mask_token else 31)}
        if mask_token:
            words["[MASK]"] = words.pop("w5")
        backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token=mask_token, pad_token="[PAD]")
        checkpoint["hyper_parameters"]["tokenizer"] = tokenizer
        assert load(checkpoint).model.config.mask_token_id == expected


def add(*path, **values):
    """A change that sets values in the dict at `path`."""

    def change(content):
        for key in path:
            content = content.setdefault(key, {})
        content.update(values)

    return change


def config(*path, **values):
    return add("hyper_parameters", "config", *path, **values)


class TestSpoiltFiles:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.pop("state_dict"), "it has no `state_dict`.*it holds `ema`"),
            (lambda c: c.pop("ema"), "no averaged weights .`ema`.. Ask for the raw ones with `use_ema=False`"),
            (lambda c: c["ema"]["shadow_params"].pop(), "29 averaged weights .`ema`. for 30 parameters"),
            (
                lambda c: c["ema"]["shadow_params"].reverse(),
                "averaged weight .* of `backbone.vocab_embed.embedding` has the shape",
            ),
            (lambda c: c["state_dict"].pop("backbone.blocks.0.norm1.weight"), "it lacks `blocks.0.norm1.weight`"),
            (
                lambda c: c["state_dict"].pop("backbone.vocab_embed.embedding"),
                "`backbone.vocab_embed.embedding` is missing",
            ),
            (add("state_dict", **{"backbone.gate": torch.ones(1)}), "holds `gate` besides"),
            (
                add("state_dict", **{"head.weight": torch.ones(1)}),
                "holds `head.weight` besides the network of MDLM.*`hf-diffusion convert lomdm`",
            ),
            (
                add("state_dict", **{"backbone.blocks.1.mlp.2.weight": torch.ones(32, 64)}),
                "`backbone.blocks.1.mlp.2.weight` has the shape .32, 64., where .32, 128. fits",
            ),
            (
                add("state_dict", **{"backbone.rotary_emb.inv_freq": torch.ones(8)}),
                "rotary frequencies .* are not those of 2 heads in a width of 32",
            ),
            (
                add("state_dict", **{"backbone.rotary_emb.inv_freq": torch.ones(100)}),
                "its 100 rotary frequencies .* do not fit a width of 32",
            ),
            (add("state_dict", **{"backbone.rotary_emb.inv_freq": torch.ones(0)}), "its 0 rotary frequencies"),
            (
                add("state_dict", **{"backbone.rotary_emb.inv_freq": 10000.0 ** -(torch.arange(8) / 8) + 0j}),
                "rotary frequencies .* are not those of 2 heads",
            ),
            (config("model", n_blocks=3), "its hyper-parameters say `n_blocks` 3, but its weights 2"),
            (config("noise", type="secret"), "it does not say `noise_schedule`"),
            (config("noise", type=["loglinear"]), "it does not say `noise_schedule`"),
            (config(parameterization=["subs"]), "it is of the parametrisation .'subs'., which is not supported"),
            (
                lambda c: c["hyper_parameters"]["config"].update(
                    time_conditioning=True, training={"change_of_variables": True}
                ),
                "reads the time in place of the noise level",
            ),
            (config(parameterization="d3pm"), "it is a D3PM model: it was trained without SUBS"),
            (config(parameterization="sedd"), "it is a SEDD model"),
            (config(parameterization="flow"), "it is of the parametrisation 'flow', which is not supported"),
            (config(diffusion="uniform"), "it is a uniform-state diffusion model .UDLM."),
            (config(backbone="dimamba"), "it is a model with the Mamba backbone"),
            (config("algo", name="bd3lm"), "it is a block diffusion model .BD3-LM."),
            (config("algo", name="duo_base"), "it is a DUO model"),
            (config("algo", name="esolm"), "it is an Eso-LM"),
            (add("state_dict", sampling_eps_min=torch.ones(())), "it is a block diffusion model"),
            (add("state_dict", **{"backbone.cond_map.embedding_table.weight": torch.ones(1)}), "UDLM"),
        ],
    )
    def test_the_error_says_what_is_wrong(self, checkpoint, load, change, message):
        change(checkpoint)
        with pytest.raises(CheckpointError, match=f"saved.ckpt: .*{message}"):
            load(checkpoint, mask_token_id=31)

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
    def test_numbers_that_are_not_finite(self, checkpoint, load, number):
        names = [name for name in checkpoint["state_dict"] if not name.endswith("inv_freq")]
        bias = "backbone.output_layer.linear.bias"
        averaged = checkpoint["ema"]["shadow_params"][names.index(bias)]
        averaged[3] = number
        message = f"saved.ckpt: its averaged weight .`ema`. of `{bias}` holds NaN or infinity. .*`use_ema=False`"
        with pytest.raises(CheckpointError, match=message):
            load(checkpoint, mask_token_id=31)
        assert load(checkpoint, use_ema=False, mask_token_id=31).info.weights == "raw"
        checkpoint["state_dict"][bias][:2] = torch.tensor([number, -number])
        for use_ema in (True, False):
            with pytest.raises(CheckpointError, match=f"saved.ckpt: its raw weight `{bias}` holds NaN or infinity"):
                load(checkpoint, use_ema=use_ema, mask_token_id=31)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
    def test_numbers_that_are_not_real(self, checkpoint, load, dtype):
        name = "backbone.vocab_embed.embedding"
        averaged = checkpoint["ema"]["shadow_params"]
        averaged[0] = averaged[0].to(dtype)
        with pytest.raises(CheckpointError, match=f"averaged weight .`ema`. of `{name}` has the dtype {dtype}"):
            load(checkpoint, mask_token_id=31)
        checkpoint["state_dict"][name] = checkpoint["state_dict"][name].to(dtype)
        with pytest.raises(CheckpointError, match=f"raw weight `{name}` has the dtype {dtype}"):
            load(checkpoint, use_ema=False, mask_token_id=31)

    def test_a_flipped_bit(self, golden, tmp_path):
        content = bytearray((golden / "subs/ref.ckpt").read_bytes())
        weights = read_checkpoint(golden / "subs/ref.ckpt")["ema"]["shadow_params"][0].numpy().tobytes()
        content[content.index(weights) + 100] ^= 1
        (tmp_path / "saved.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match="saved.ckpt: its record 'archive/data/.*' is damaged"):
            load_mdlm_checkpoint(tmp_path / "saved.ckpt")

    def test_the_sedd_repository(self, load):
        with pytest.raises(CheckpointError, match="it is a SEDD model"):
            load({"model": {"vocab_embed.embedding": torch.ones(2, 2)}, "ema": {}, "step": 1})

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model_type": "mdlm"}, "loads as it is. Use AutoModel.from_pretrained"),
            ({"model_type": "lomdm"}, "loads as it is. Use AutoModel.from_pretrained"),
            ({"model_type": "bd3lm"}, "is a block diffusion model"),
            ({"model_type": "EsoLM"}, "an Eso-LM"),
            ({"model_type": "gpt2"}, "names the `model_type` 'gpt2', .* Name a checkpoint file"),
            ({"tokens": 50257, "graph": {"type": "absorb"}, "noise": {"type": "loglinear"}}, "is a SEDD model"),
            ({"hidden_size": 768}, "names no `model_type`, so it is not of MDLM. Name a checkpoint file"),
            (None, "a folder. Name the checkpoint file in it"),
        ],
    )
    def test_a_folder_is_no_checkpoint(self, tmp_path, config, message):
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"{tmp_path} .*{message}"):
            load_mdlm_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b'{"model_type": ', "is not JSON"), (b"\xff\xfe\xfd", "is not JSON"), (b"[1]", "holds a list, not a config")],
    )
    def test_a_folder_with_a_broken_configuration(self, tmp_path, content, message):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"config.json {message}.* Name a checkpoint file"):
            load_mdlm_checkpoint(tmp_path)

    def test_a_setting_that_there_is_not(self, golden):
        with pytest.raises(ValueError, match="`num_heads` is not a setting of MDLM.*`num_attention_heads`"):
            load_mdlm_checkpoint(golden / "subs/ref.ckpt", num_heads=2)
        with pytest.raises(CheckpointError, match="autoregressive baseline, which has no `time_conditioning`"):
            load_mdlm_checkpoint(golden / "ar/ref.ckpt", time_conditioning=False)

    def test_a_setting_that_does_not_fit(self, golden):
        with pytest.raises(CheckpointError, match="rotary frequencies .* are not those of 4 heads"):
            load_mdlm_checkpoint(golden / "subs/ref.ckpt", n_heads=4)
        with pytest.raises(CheckpointError, match="do not make a configuration: .*`mask_token_id`"):
            load_mdlm_checkpoint(golden / "subs/ref.ckpt", mask_token_id=99)

    @pytest.mark.parametrize(
        ("heads", "message"), [(0, "must be at least 1, got 0"), (3, ""), ("a", "expected int, got str")]
    )
    def test_heads_that_are_none(self, golden, heads, message):
        with pytest.raises(
            CheckpointError,
            match=f"(?s)ref.ckpt: its settings do not make a configuration: .*`?num_attention_heads.*{message}",
        ):
            load_mdlm_checkpoint(golden / "subs/ref.ckpt", num_attention_heads=heads)

    @pytest.mark.parametrize("load", [load_mdlm_checkpoint, load_lomdm_checkpoint])
    @pytest.mark.parametrize("use_ema", ["raw", 0, None])
    def test_which_weights_is_yes_or_no(self, tmp_path, load, use_ema):
        with pytest.raises(ValueError, match=f"`use_ema` must be True .* or False .*, got {use_ema!r}"):
            load(tmp_path / "not there", use_ema)


class TestConvert:
    def test_command_writes_a_folder_that_loads(self, golden, tmp_path, capsys):
        output = tmp_path / "new" / "model"
        assert main(["convert", "mdlm", str(golden / "subs_tc/ref.ckpt"), str(output)]) == 0
        printed = capsys.readouterr().out
        assert "MDLMForMaskedDiffusion" in printed and "averaged weights" in printed and "gpt2" in printed
        assert {file.name for file in output.iterdir()} >= {"config.json", "model.safetensors"}
        expected = load_file(golden / "subs_tc/golden.safetensors")
        model = AutoModelForMaskedLM.from_pretrained(output)
        assert (logits_of(model, expected) - expected["ema.logits"]).abs().max() < 2e-5
        assert list(output.parent.iterdir()) == [output]

    def test_raw_weights_on_request(self, golden, tmp_path):
        output = tmp_path / "model"
        output.mkdir()  # an empty folder may be there
        flags = ["--raw", "--mask-token-id", "7"]
        assert main(["convert", "mdlm", str(golden / "subs_bertmask/ref.ckpt"), str(output), *flags]) == 0
        expected = load_file(golden / "subs_bertmask/golden.safetensors")
        model = AutoModelForMaskedLM.from_pretrained(output)
        assert (logits_of(model, expected) - expected["raw.logits"]).abs().max() < 2e-5

    def test_a_tokenizer_is_written_with_the_mask_token(self, golden, tmp_path):
        backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(31)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        convert_mdlm_checkpoint(golden / "subs/ref.ckpt", tmp_path / "model", tokenizer=tokenizer)
        assert AutoTokenizer.from_pretrained(tmp_path / "model").mask_token_id == 31

    @pytest.mark.parametrize("kind", ["missing", "truncated", "text", "foreign"])
    def test_a_bad_file_leaves_nothing_behind(self, golden, tmp_path, capsys, kind):
        file, output = tmp_path / "bad.ckpt", tmp_path / "out" / "model"
        genuine = (golden / "subs/ref.ckpt").read_bytes()
        if kind == "foreign":
            torch.save({"state_dict": {"transformer.wte.weight": torch.ones(3, 3)}}, file)
        elif kind != "missing":
            file.write_bytes({"truncated": genuine[: len(genuine) // 2], "text": b"<html>Quota exceeded</html>"}[kind])
        assert main(["convert", "mdlm", str(file), str(output)]) == 2
        assert "bad.ckpt" in capsys.readouterr().err
        assert not output.exists() and not output.parent.exists()

    def test_a_wrong_tokenizer_leaves_nothing_behind(self, golden, tmp_path):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"w": 0}, unk_token="w")))
        with pytest.raises(ValueError, match="`tokenizer` has 1 tokens and the mask token None, but .* is 31"):
            convert_mdlm_checkpoint(golden / "subs/ref.ckpt", tmp_path / "model", tokenizer=tokenizer)
        assert list(tmp_path.iterdir()) == []

    def test_a_failure_while_writing_leaves_nothing_behind(self, golden, tmp_path, monkeypatch):
        def fail(self, folder, **_):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError("no space left on device")

        monkeypatch.setattr(MDLMForMaskedDiffusion, "save_pretrained", fail)
        with pytest.raises(OSError, match="no space left"):
            convert_mdlm_checkpoint(golden / "subs/ref.ckpt", tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

    def test_what_is_there_already_is_not_overwritten(self, golden, tmp_path, capsys):
        (tmp_path / "kept.txt").write_text("mine")
        assert main(["convert", "mdlm", str(golden / "subs/ref.ckpt"), str(tmp_path)]) == 2
        assert "exists already" in capsys.readouterr().err
        assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]

    def test_a_malicious_file_runs_nothing(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save({"state_dict": {}, "hyper_parameters": Payload()}, tmp_path / "evil.ckpt")
        with pytest.raises(CheckpointError, match="its `state_dict` holds nothing"):
            load_mdlm_checkpoint(tmp_path / "evil.ckpt")
        assert not (tmp_path / "ran").exists()
