"""What `from_pretrained` and `PreTrainedModel` offer works for every family, or is refused with the reason."""

import json
import re

import pytest
import torch
from families import FAMILIES, NUM_TOKENS, VOCAB_SIZE
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, TorchAoConfig

from hf_diffusion import MDLMForMaskedDiffusion, pack_linear_layers


WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def folder(family, tmp_path):
    family.model().save_pretrained(tmp_path)
    return tmp_path


def text(batch=2, length=9):
    return torch.randint(NUM_TOKENS, (batch, length), generator=torch.Generator().manual_seed(2))


def written(model):
    return model.generate(text(), max_new_tokens=6, generator=torch.Generator().manual_seed(3))


def close(loaded, model, tolerance=1e-4):
    with torch.no_grad():
        torch.testing.assert_close(loaded(text()).logits, model(text()).logits, rtol=tolerance, atol=tolerance)
    return torch.equal(written(loaded), written(model))


class TestOptions:
    @pytest.mark.parametrize(
        "options",
        [
            {"device_map": "cpu"},
            {"device_map": "auto"},
            {"device_map": {"": "cpu"}},
            {"low_cpu_mem_usage": True},
            {"use_safetensors": True},
            {"disable_mmap": True},
        ],
        ids=str,
    )
    def test_changes_nothing(self, family, folder, options):
        assert close(AutoModel.from_pretrained(folder, **options), family.model())

    def test_weights_on_disk(self, family, folder, tmp_path):
        loaded = AutoModel.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")
        assert all(weight.is_meta for weight in loaded.parameters())
        assert close(loaded, family.model())

    def test_weights_on_disk_where_memory_is_short(self, family, folder, tmp_path):
        size = sum(weight.nbytes for weight in family.model().parameters())
        loaded = AutoModel.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offloaded"
        )
        assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
        assert close(loaded, family.model())

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_attention_implementations_agree(self, family, folder, implementation):
        loaded = AutoModel.from_pretrained(folder, attn_implementation=implementation)
        assert loaded.config._attn_implementation == implementation
        assert close(loaded, family.model())

    def test_sharded(self, family, tmp_path):
        model = family.model()
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 5
        assert close(AutoModel.from_pretrained(tmp_path), model)

    def test_an_argument_that_is_none_is_refused(self, family, folder):
        with pytest.raises(TypeError, match="num_stream"):
            AutoModel.from_pretrained(folder, num_stream=3)

    def test_attention_weights_are_refused(self, family, folder):
        with pytest.raises(ValueError, match="`output_attentions` has no effect"):
            AutoModel.from_pretrained(folder, attn_implementation="eager", output_attentions=True)

    @pytest.mark.slow
    def test_compiled(self, family, folder):
        loaded = AutoModel.from_pretrained(folder)
        loaded.compile(backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(loaded(text()).logits, family.model()(text()).logits, rtol=1e-3, atol=1e-3)


class TestDtype:
    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            ("bfloat16", torch.bfloat16),
            (torch.float16, torch.float16),
            ("float64", torch.float64),
            ("auto", torch.bfloat16),
            (None, torch.bfloat16),
        ],
        ids=str,
    )
    def test_is_the_one_asked_for_or_that_of_the_file(self, family, tmp_path, dtype, expected):
        family.model(torch.bfloat16).save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
        kept = loaded._keep_in_fp32_modules if expected == torch.float16 else ()
        for name, weight in loaded.named_parameters():
            assert weight.dtype == (torch.float32 if any(part in name for part in kept) else expected), name
        assert loaded(text()).logits.dtype == expected
        assert written(loaded).shape == (2, 15)

    def test_default_dtype_of_torch_is_left_alone(self, family, folder):
        AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
        assert torch.get_default_dtype() == torch.float32


class TestResizedVocabulary:
    @pytest.mark.parametrize("tied", [True, False])
    def test_known_tokens_keep_their_logits(self, family, tied, tmp_path):
        model = family.model(tie_word_embeddings=tied, mask_token_id=5)
        before = model(text()).logits
        model.resize_token_embeddings(VOCAB_SIZE + 4)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert model.config.vocab_size == VOCAB_SIZE + 4
        assert model.config.mask_token_id == 5
        torch.testing.assert_close(model(text()).logits[..., :VOCAB_SIZE], before)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert (loaded.config.vocab_size, loaded.config.mask_token_id) == (VOCAB_SIZE + 4, 5)
        assert close(loaded, model)

    def test_new_tokens_are_read_predicted_and_drawn(self, family):
        model = family.model(mask_token_id=5)
        model.resize_token_embeddings(VOCAB_SIZE + 40)
        ids = torch.full((2, 5), VOCAB_SIZE + 39)
        assert family.loss(model, ids).isfinite()
        drawn = model.generate(ids, max_new_tokens=40, temperature=100.0)[:, 5:]
        assert bool((drawn >= VOCAB_SIZE).any())

    def test_fewer_tokens(self, family):
        model = family.model(mask_token_id=5)
        ids = text() % 9
        before = model(ids).logits[..., :9]
        model.resize_token_embeddings(9)
        torch.testing.assert_close(model(ids).logits, before)

    @pytest.mark.parametrize("name", ["mask_token_id", "eos_token_id"])
    def test_no_special_token_is_cut_off(self, name):
        model = FAMILIES["mdlm"].model(**{"mask_token_id": 5, name: VOCAB_SIZE - 1})
        with pytest.raises(ValueError, match=f"`{name}` must lie in the vocabulary"):
            model.resize_token_embeddings(VOCAB_SIZE - 1)
        assert len(model.get_input_embeddings().weight) == model.config.vocab_size == VOCAB_SIZE

    def test_a_mask_outside_the_vocabulary_stays_where_the_tokenizer_has_it(self, caplog):
        model = FAMILIES["armd"].model()
        assert model.config.mask_token_id == VOCAB_SIZE
        model.resize_token_embeddings(VOCAB_SIZE - 2)
        assert not caplog.records
        model.resize_token_embeddings(VOCAB_SIZE + 2)
        assert f"`mask_token_id` ({VOCAB_SIZE}) was outside the vocabulary" in caplog.text
        assert model.config.mask_token_id == VOCAB_SIZE


class TestQuantised:
    """By torchao; bitsandbytes is tested in tests/training/test_quantized.py."""

    def test_torchao_int8(self, family, folder, tmp_path):
        quantization = pytest.importorskip("torchao.quantization")
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        loaded = AutoModel.from_pretrained(folder, quantization_config=config)
        rounded, num_rounded = family.model(), 0
        for name, weight in loaded.named_parameters():
            if type(weight) is not torch.nn.Parameter:
                rounded.get_parameter(name).data = weight.dequantize().data
                num_rounded += 1
        assert num_rounded >= 6 * family.config().num_hidden_layers
        pack_linear_layers(loaded)
        close(loaded, rounded, tolerance=1e-3)
        loaded.save_pretrained(tmp_path / "quantised")
        again = AutoModel.from_pretrained(tmp_path / "quantised")
        assert torch.equal(again(text()).logits, loaded(text()).logits)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


class TestDamaged:
    """The error names the file and the tensor."""

    def refused(self, folder, *names, error=ValueError, **options):
        with pytest.raises(error) as caught:
            AutoModel.from_pretrained(folder, **options)
        for name in names:
            assert str(name) in str(caught.value)

    @pytest.fixture
    def shards(self, family, tmp_path):
        family.model().save_pretrained(tmp_path, max_shard_size="20KB")
        held = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        path = tmp_path / held[WEIGHT]
        return path, min(name for name, file in held.items() if file == path.name)

    def test_shard_that_is_missing(self, shards, tmp_path):
        path, first = shards
        path.unlink()
        self.refused(tmp_path, path, first, error=FileNotFoundError)

    @pytest.mark.parametrize("length", [0, 20, -40])
    def test_shard_that_is_cut_off(self, shards, length, tmp_path):
        path, first = shards
        path.write_bytes(path.read_bytes()[:length])
        self.refused(tmp_path, path, WEIGHT if length < 0 else first)

    @pytest.mark.usefixtures("shards")
    @pytest.mark.parametrize("length", [0, 80])
    def test_index_that_is_cut_off(self, length, tmp_path):
        index = tmp_path / "model.safetensors.index.json"
        index.write_bytes(index.read_bytes()[:length])
        with pytest.raises(ValueError, match=f"{re.escape(str(index))}` is damaged or cut off"):
            AutoModel.from_pretrained(tmp_path)

    def test_shard_that_lacks_a_tensor(self, shards, tmp_path):
        path, _ = shards
        tensors = load_file(path)
        del tensors[WEIGHT]
        save_file(tensors, path, {"format": "pt"})
        self.refused(tmp_path, path, f"`{WEIGHT}` is missing")

    def test_one_file_that_is_cut_off(self, folder):
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-4])
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        del header["__metadata__"]
        last = max(header, key=lambda name: header[name]["data_offsets"])
        self.refused(folder, path, f"`{last}` cannot be read")

    @pytest.mark.parametrize("kept", [0, 500, -40])
    def test_file_of_pytorch_that_is_cut_off(self, folder, kept):
        path = folder / "pytorch_model.bin"
        torch.save(load_file(folder / "model.safetensors"), path)
        (folder / "model.safetensors").unlink()
        AutoModel.from_pretrained(folder)
        path.write_bytes(path.read_bytes()[:kept])
        self.refused(folder, path)

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        self.refused(folder, "model.safetensors", error=OSError)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_values_that_are_not_finite(self, family, value, dtype, tmp_path):
        family.model(dtype).save_pretrained(tmp_path)
        change_tensors(tmp_path, lambda tensors: tensors[WEIGHT][3].fill_(value))
        self.refused(tmp_path, tmp_path / "model.safetensors", f"`{WEIGHT}` holds NaN or infinite")

    def test_large_values_are_not_infinite_ones(self, family, tmp_path):
        family.model(torch.float16).save_pretrained(tmp_path)
        change_tensors(tmp_path, lambda tensors: tensors[WEIGHT].fill_(60000))
        assert AutoModel.from_pretrained(tmp_path).dtype == torch.float16

    def test_tensor_of_another_shape(self, folder):
        change_tensors(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:-1].clone()}))
        self.refused(folder, folder / "model.safetensors", f"`{WEIGHT}` has the shape (127, 32)", "(128, 32)")
        loaded = AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True)
        assert loaded.get_parameter(WEIGHT).shape == (128, 32)
        assert loaded.get_parameter(WEIGHT).isfinite().all()

    @pytest.mark.parametrize("change", ["missing", "left over"])
    def test_other_tensors_are_refused_unless_the_report_is_asked_for(self, folder, change):
        other = "model.layers.1.mlp.gate_proj.weight"
        change_tensors(
            folder,
            lambda tensors: tensors.pop(WEIGHT) if change == "missing" else tensors.update({other: torch.ones(2)}),
        )
        name = WEIGHT if change == "missing" else other
        self.refused(folder, folder / "model.safetensors", f"`{name}`", "output_loading_info")
        _, report = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert report["missing_keys"] | report["unexpected_keys"] == {name}

    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"num_hidden_layers": 3}, "`model.layers.3."),
            ({"num_hidden_layers": 5}, "`model.layers.4."),
            ({"intermediate_size": 64}, "mlp.down_proj.weight` has the shape (32, 128)"),
            ({"vocab_size": VOCAB_SIZE + 1}, f"has the shape ({VOCAB_SIZE},"),
        ],
        ids=str,
    )
    def test_config_of_another_model(self, folder, settings, name):
        change_config(folder, **settings)
        self.refused(folder, folder / "model.safetensors", name)

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"hidden_act": "gluu"}, "`hidden_act` must be one of .*'gluu'"),
            ({"hidden_size": "32"}, "'hidden_size' expected int"),
            ({"num_attention_heads": 3}, "`num_attention_heads` .3."),
            ({"model_type": "bert"}, "`model_type` is 'bert'"),
        ],
        ids=str,
    )
    def test_config_that_makes_no_sense(self, family, folder, settings, reason):
        change_config(folder, **settings)
        with pytest.raises(ValueError, match=reason):
            family.model_class.from_pretrained(folder)

    def test_config_that_is_cut_off(self, folder):
        path = folder / "config.json"
        path.write_text(path.read_text()[:40])
        self.refused(folder, path, error=OSError)


class TestOtherClass:
    """A checkpoint of the network alone goes into the class with a head, and the other way round."""

    @pytest.mark.parametrize("name", ["armd", "mdlm"])
    def test_base_and_head(self, name, tmp_path):
        model, ids = FAMILIES[name].model(), text()
        model.save_pretrained(tmp_path / "head")
        model.model.save_pretrained(tmp_path / "base")
        base = type(model.model).from_pretrained(tmp_path / "head")
        expected = model.model(ids).last_hidden_state
        torch.testing.assert_close(base(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
        head = FAMILIES[name].model_class.from_pretrained(tmp_path / "base")
        torch.testing.assert_close(head.model(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-4)

    def test_but_not_with_a_part_of_the_network(self, tmp_path):
        FAMILIES["mdlm"].model().model.save_pretrained(tmp_path)
        change_tensors(tmp_path, lambda tensors: tensors.pop("norm.weight"))
        with pytest.raises(ValueError, match="`model.norm.weight` is missing"):
            MDLMForMaskedDiffusion.from_pretrained(tmp_path)

    def test_an_adapter_brings_its_base_model(self, family, folder, tmp_path):
        model = get_peft_model(family.model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
        model.save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(folder)}))
        assert close(AutoModel.from_pretrained(tmp_path / "adapter"), model)
