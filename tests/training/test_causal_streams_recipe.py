"""`hf-diffusion train --from-causal-lm`: an adapter with its gap vector, and the causal model as it was without it."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_diffusion.cli import main
from hf_diffusion.conversion import from_causal_lm
from hf_diffusion.diffusion import orders
from hf_diffusion.training.data import TokenTexts, load_text, tokenize, train_tokenizer
from hf_diffusion.training.run import split_text


LENGTH = 32
SETTINGS = {
    "steps": 30,
    "evaluate-every": 15,
    "text-length": LENGTH,
    "batch-size": 4,
    "warmup-steps": 2,
    "learning-rate": 1e-2,
    "lora-rank": 4,
}
FLAGS = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    words = ["the", "king", "speaks", "and", "all", "men", "hear", "him", "now", "\n"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[i] for i in torch.randint(10, (5_000,), generator=generator)))
    return path


@pytest.fixture(scope="module")
def causal_lm(text, tmp_path_factory):
    """The folder of a tiny causal model with a tokenizer."""
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = train_tokenizer(load_text(str(text)), 300)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id, **sizes)
    config.bos_token_id, config.initializer_range = None, 0.1
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(text, causal_lm, tmp_path_factory):
    output = tmp_path_factory.mktemp("adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        arguments = ["--from-causal-lm", str(causal_lm), "--text", str(text), "--output", str(output)]
        assert main(["train", *arguments, *FLAGS]) == 0
    return output


@torch.no_grad()
def loss_in_streams(model, texts, start_token_id, num_streams):
    started = torch.nn.functional.pad(texts, (1, 0), value=start_token_id)
    steps = torch.cat([torch.tensor([-1]), orders.strided_steps(LENGTH, num_streams)]).expand_as(started)
    blocks = orders.after_given(steps, torch.ones_like(started, dtype=torch.bool))
    log_probs = model(started, block_index=blocks).logits.log_softmax(-1)
    return float(-log_probs.gather(-1, started[..., None])[:, 1:].mean())


def held_out(text, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return TokenTexts(tokenize(split_text(load_text(str(text)), 0.1)[1], tokenizer), LENGTH).texts, tokenizer


def test_what_is_written_is_the_adapter_and_its_results(adapter, causal_lm, text):
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert sum(name.endswith("gap.weight") for name in names) == 1
    assert len(names) == 1 + 2 * 2 * 4  # two matrices for each of four maps in two layers
    assert not (adapter / "model.safetensors").exists()
    results = json.loads((adapter / "results.json").read_text())
    texts, tokenizer = held_out(text, adapter)
    model = PeftModel.from_pretrained(from_causal_lm(causal_lm), adapter).eval()
    for name, num_streams in (("left_to_right", 1), ("4_streams", 4)):
        reported = results["validation_loss_nats_per_token"][name]
        assert reported == pytest.approx(loss_in_streams(model, texts, tokenizer.eos_token_id, num_streams), rel=1e-5)
        with model.disable_adapter():
            assert reported < loss_in_streams(model, texts, tokenizer.eos_token_id, num_streams) - 0.2


def test_without_the_adapter_it_is_the_causal_model_to_the_bit(adapter, causal_lm, text):
    texts, _ = held_out(text, adapter)
    plain = AutoModelForCausalLM.from_pretrained(causal_lm).eval()
    untrained = from_causal_lm(AutoModelForCausalLM.from_pretrained(causal_lm)).eval()
    model = PeftModel.from_pretrained(from_causal_lm(causal_lm), adapter).eval()
    backwards = torch.arange(LENGTH).flip(0).expand_as(texts)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(texts).logits[:, 1:], plain(texts).logits[:, :-1])
        assert torch.equal(model(texts, block_index=backwards).logits, untrained(texts, block_index=backwards).logits)
        prompt = {"input_ids": texts[:2, :5], "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(**prompt), plain.generate(**prompt))
    with torch.no_grad():  # and with it, both the weights and the gap vector are others
        assert not torch.equal(model(texts).logits[:, 1:], plain(texts).logits[:, :-1])
        assert not torch.equal(model(texts).logits[:, 0], untrained(texts).logits[:, 0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--family", "causal_streams"], "`from_causal_lm` is missing, and `family`='causal_streams' needs it"),
        (["--from-causal-lm", "folder", "--hidden-size", "64"], "`hidden_size` .64. has no effect"),
        (["--from-causal-lm", "folder", "--family", "armd"], "`from_causal_lm` .folder. has no effect"),
        (["--from-causal-lm", "folder", "--lora-rank", "0"], "`lora_rank` must be at least 1, got 0"),
        (
            ["--from-causal-lm", "folder", "--shuffled-share", "1.5"],
            "`shuffled_share` must be between 0 and 1, got 1.5",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[-2],
)
def test_flags_that_do_not_fit_are_refused(flags, message, text, tmp_path, capsys):
    assert main(["train", "--text", str(text), "--output", str(tmp_path / "output"), *flags]) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
