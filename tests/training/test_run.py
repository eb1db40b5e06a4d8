"""Training from the command line: what it leaves behind, and resumed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hf_diffusion.cli import main
from hf_diffusion.diffusion.orders import strided_steps
from hf_diffusion.training import curves
from hf_diffusion.training.data import TokenTexts, load_text, tokenize
from hf_diffusion.training.families import FAMILIES
from hf_diffusion.training.run import split_text, train


TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "text_length": 32,
    "batch_size": 4,
    "warmup_steps": 2,
    "validation_texts": 4,
}
OWN = {
    "armd": {"max_shuffled": 8},
    "mdlm": {"validation_draws": 4},
    "mdlm_blocks": {"family": "mdlm", "validation_draws": 4, "block_size": 5},
    "lomdm": {"validation_draws": 4},
    "llama": {},
}
EVALUATIONS = {
    "armd": ["left_to_right", "2_streams", "4_streams", "8_streams"],
    "mdlm": ["bound"],
    "lomdm": ["bound"],
    "mdlm_blocks": ["bound"],
    "llama": ["left_to_right"],
}
LOSSES, ERRORS = "validation_loss_nats_per_token", "standard_error_nats_per_token"

every_family = pytest.mark.parametrize("family", OWN)


def recipe(family, text, output, **settings):
    settings = {"family": family, **TINY, **OWN[family], **settings}
    return FAMILIES[settings.pop("family")](text=str(text), output=output, **settings)


def flags(family, **settings):
    values = {"family": family, **TINY, **OWN[family], **settings}
    return [part for name, value in values.items() for part in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    words = ["the", "king", "speaks", "and", "all", "men", "hear", "him", "now", "\n"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[i] for i in torch.randint(10, (20_000,), generator=generator)))
    return path


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@torch.no_grad()
def loss_of_saved_model(family, folder, text):
    """What the files in `folder` score on the held-out text, by the model alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = tokenize(split_text(load_text(str(text)), 0.1)[1], tokenizer)
    texts = TokenTexts(held_out, TINY["text_length"]).texts
    if family == "armd":
        order = strided_steps(texts.shape[1], 4).expand(texts.shape)
        return "4_streams", float(AutoModel.from_pretrained(folder)(texts, labels=texts, block_index=order).loss)
    if family == "llama":
        started = torch.nn.functional.pad(texts, (1, 0), value=tokenizer.eos_token_id)
        logits = AutoModelForCausalLM.from_pretrained(folder)(started).logits[:, :-1]
        return "left_to_right", float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts))
    # MDLM's own loss: other masks, drawn in time.
    model = AutoModelForMaskedLM.from_pretrained(folder)
    return "bound", float(torch.stack([model(texts, labels=texts).loss for _ in range(100)]).mean())


@every_family
def test_command_trains_evaluates_and_writes_everything(family, text, tmp_path, capsys):
    output = tmp_path / "model"
    arguments = ["--text", str(text), "--output", str(output), *flags(family, steps=30, evaluate_every=15)]
    assert main(["train", *arguments]) == 0
    results = json.loads((output / "results.json").read_text())
    losses, errors = results[LOSSES], results[ERRORS]
    assert list(losses) == EVALUATIONS[family]
    assert max(losses.values()) < 5.0 < torch.tensor(300.0).log()
    assert list(errors) == [name for name in losses if name == "bound"]
    assert results["training_tokens"] == 30 * 4 * 32
    assert results["family"] == OWN[family].get("family", family)
    assert json.loads((output / "config.json").read_text()).get("block_size") == OWN[family].get("block_size")
    name, expected = loss_of_saved_model(family, output, text)
    assert losses[name] == pytest.approx(expected, rel=3e-2 if name == "bound" else 1e-5)
    printed = capsys.readouterr().out
    for name, loss in losses.items():
        assert f"validation loss, {name.replace('_', ' ')}: {loss:.3f}" in printed
    assert all(f"± {error:.3f} nats" in printed for error in errors.values())
    assert (output / "checkpoints" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_trained_armd_writes_on(text, tmp_path):
    train(recipe("armd", text, tmp_path, steps=4, evaluate_every=4, warmup_steps=1))
    model, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    # The text has too few words for the 300 tokens asked for.
    assert model.config.mask_token_id == tokenizer.mask_token_id == model.config.vocab_size < 300
    assert model.config.use_cache
    sequences = model.generate(**tokenizer("the king", return_tensors="pt"), max_new_tokens=8)
    assert tokenizer.decode(sequences[0]).startswith("the king")


def test_trained_mdlm_reads_its_mask(text, tmp_path):
    train(recipe("mdlm", text, tmp_path, steps=4, evaluate_every=4, warmup_steps=1))
    model, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.mask_token_id == tokenizer.mask_token_id == model.config.vocab_size - 1
    assert "use_cache" not in json.loads((tmp_path / "config.json").read_text())
    logits = model(**tokenizer("the<|mask|>king", return_tensors="pt")).logits
    assert bool(logits[..., : tokenizer.mask_token_id].isfinite().all())


@every_family
def test_weights_stored_in_half_are_used_in_full(family, text, tmp_path):
    settings = recipe(family, text, tmp_path, steps=6, evaluate_every=6, store_half=True)
    results = train(settings)
    stored = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert "lm_head.weight" not in stored
    assert sum(weight.numel() for weight in stored.values()) == results["parameters"]
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.float32
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        train(settings)


def test_a_round_of_evaluations_is_drawn_once(text, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "plot_losses", lambda history, *_: drawn.append(history[-1]["step"]))
    train(recipe("armd", text, tmp_path, steps=6, evaluate_every=2, warmup_steps=1))
    assert drawn == [2, 4, 6]


def test_few_held_out_texts_are_evaluated_all_the_same(text, tmp_path):
    few = {"batch_size": 16, "validation_fraction": 0.03, "warmup_steps": 1}
    results = train(recipe("armd", text, tmp_path, steps=4, evaluate_every=4, **few))
    assert results["validation_tokens"] % (16 * 32) != 0
    assert 0 < results[LOSSES]["left_to_right"] < 6


def test_a_text_of_its_own_to_validate_on(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("all men hear the king\n" * 60)
    settings = {"steps": 4, "evaluate_every": 4, "warmup_steps": 1, "validation_text": other}
    results = train(recipe("llama", text, tmp_path / "model", **settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert results["tokens_in_text"] == len(tokenize(load_text(str(text)), tokenizer))
    assert results["validation_tokens"] == len(tokenize(load_text(str(other)), tokenizer)) // 32 * 32


@every_family
def test_stopped_and_resumed_training_ends_where_uninterrupted_training_does(family, text, tmp_path):
    def settings(name, **overrides):
        return recipe(family, text, tmp_path / name, steps=12, evaluate_every=6, dropout=0.1, **overrides)

    through = train(settings("through"))
    # A run that is killed after its first checkpoint leaves what a shorter run of the same schedule leaves.
    train(settings("stopped"))
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "checkpoint-12")
    resumed = train(settings("stopped", resume=True))
    assert resumed[LOSSES] == pytest.approx(through[LOSSES], rel=1e-6)


def test_a_run_is_not_continued_as_another_one(text, tmp_path):
    settings = {"steps": 6, "evaluate_every": 3, "warmup_steps": 1}
    train(recipe("mdlm", text, tmp_path, **settings))
    with pytest.raises(ValueError, match="`block_size` is 8, but the run in .* was begun with None"):
        train(recipe("mdlm", text, tmp_path, resume=True, block_size=8, **settings))
    train(recipe("mdlm", text, tmp_path, resume=True, **{**settings, "steps": 9}))


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(text, tmp_path):
    settings = {"steps": 6, "evaluate_every": 2, "warmup_steps": 1}
    train(recipe("armd", text, tmp_path, **settings))
    expected = load_file(tmp_path / "model.safetensors")
    checkpoints = tmp_path / "checkpoints"
    # As a process leaves it that is killed while it writes: some files, the last of them cut off.
    for path in [*checkpoints.glob("checkpoint-6/*.safetensors"), *checkpoints.glob("checkpoint-6/scheduler.pt")]:
        path.unlink()
    optimizer = checkpoints / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    train(recipe("armd", text, tmp_path, resume=True, **settings))
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), expected)
    for path in checkpoints.glob("checkpoint-*/ema.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="holds no complete checkpoint to `resume` from"):
        train(recipe("armd", text, tmp_path, resume=True, **settings))
    (tmp_path / "model.safetensors").unlink()
    train(recipe("armd", text, tmp_path, **settings))  # which begins anew: what is incomplete is no run
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "0"], "`steps` must be at least 1"),
        (["--family", "gpt"], "`family` must be one of armd, mdlm, lomdm, llama, causal_streams, got 'gpt'"),
        (["--max-shuffled", "0"], "`max_shuffled` must be at least 1"),
        (["--validation-fraction", "1"], "`validation_fraction` must be between 0 and 1"),
        (["--text", "nowhere.txt"], "'nowhere.txt' is not a file"),
        (["--steps", "100", "--warmup-steps", "90"], "`warmup_steps` (90) and the decay (20 steps) do not fit"),
        (["--num-attention-heads", "3"], "`hidden_size` (256) must be an even multiple of `num_attention_heads` (3)"),
        (["--hidden-size", "0"], "`hidden_size` must be at least 1, got 0"),
        (["--tokenizer", "gpt2", "--vocab-size", "300"], "`vocab_size` (300) has no effect with `tokenizer`='gpt2'"),
        (["--family", "lomdm", "--c2", "0.7"], "`c2` (0.7) must be at least 0 and less than `c1` (0.7)"),
        (["--family", "lomdm", "--bound-estimator", "elbo"], "bound_estimator"),
        (["--text-length", "4"], "`text_length` must be at least the most streams validated (8)"),
        (["--vocab-size", "100"], "`vocab_size` must be at least 258"),
        (["--family", "mdlm", "--validation-draws", "1"], "`validation_draws` must be at least 2"),
        (["--family", "mdlm", "--block-size", "0"], "`block_size` must be 1 to `text_length` (256)"),
        (["--family", "mdlm", "--block-size", "257"], "`block_size` must be 1 to `text_length` (256)"),
        (
            ["--validation-draws", "4"],
            "`validation_draws` (4) has no effect with `family`='armd'; it is for mdlm and lomdm.",
        ),
        (["--family", "mdlm", "--no-left-neighbour"], "`left_neighbour` (False) has no effect with `family`='mdlm'"),
        (
            ["--family", "llama", "--num-streams", "1", "2"],
            "`num_streams` ([1, 2]) has no effect with `family`='llama'",
        ),
        (["--validation-text", "nowhere.txt"], "`validation_text`='nowhere.txt' is not a file"),
        (
            ["--validation-text", __file__, "--validation-fraction", "0.1"],
            "`validation_fraction` (0.1) has no effect with `validation_text`",
        ),
    ],
    ids=[
        *("steps", "family", "rho", "fraction", "text", "warm-up", "heads", "width", "two-sizes", "c2", "estimator"),
        *("length", "vocabulary", "draws", "no-block", "long-block", "of-mdlm", "switch-of-armd", "several-of-armd"),
        *("validation-text", "two-validations"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(given, message, text, tmp_path, capsys):
    output = tmp_path / "model"
    assert main(["train", "--text", str(text), "--output", str(output), *given]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
