"""Training from the command line: what it leaves behind, resumed, and on two processes."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from hf_diffusion.cli import main
from hf_diffusion.training.run import TrainingSettings, train


TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "block_length": 32,
    "batch_size": 4,
    "warmup_steps": 2,
    "validation_blocks": 4,
    "max_shuffled": 8,
}
FLAGS = [part for name, value in TINY.items() for part in ("--" + name.replace("_", "-"), str(value))]


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


def test_command_trains_evaluates_and_writes_everything(text, tmp_path, capsys):
    output = tmp_path / "model"
    arguments = ["--text", str(text), "--output", str(output), "--steps", "30", "--evaluate-every", "15", *FLAGS]
    assert main(["train", *arguments]) == 0
    results = json.loads((output / "results.json").read_text())
    losses = results["validation_loss_nats_per_token"]
    assert list(losses) == ["left_to_right", "2_streams", "4_streams", "8_streams"]
    assert max(losses.values()) < 5.0 < torch.tensor(300.0).log()
    assert results["training_tokens"] == 30 * 4 * 32
    assert f"validation loss, left to right: {losses['left_to_right']:.3f} nats" in capsys.readouterr().out
    assert (output / "checkpoints" / "loss.png").read_bytes().startswith(b"\x89PNG")

    model, tokenizer = AutoModel.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    # The text has too few words for the 300 tokens asked for.
    assert model.config.mask_token_id == tokenizer.mask_token_id == model.config.vocab_size < 300
    sequences = model.generate(**tokenizer("the king", return_tensors="pt"), max_new_tokens=8)
    assert tokenizer.decode(sequences[0]).startswith("the king")


def test_weights_stored_in_half_are_used_in_full(text, tmp_path):
    settings = TrainingSettings(text=str(text), output=tmp_path, steps=6, evaluate_every=6, store_half=True, **TINY)
    results = train(settings)
    stored = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    assert "lm_head.weight" not in stored
    assert sum(weight.numel() for weight in stored.values()) == results["parameters"]
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.float32
    with pytest.raises(ValueError, match="holds checkpoints of another run"):
        train(settings)


def test_few_held_out_blocks_are_evaluated_all_the_same(text, tmp_path):
    few = {**TINY, "batch_size": 16, "validation_fraction": 0.03}
    results = train(TrainingSettings(text=str(text), output=tmp_path, steps=4, evaluate_every=4, **few))
    assert results["validation_tokens"] % (16 * 32) != 0
    assert 0 < results["validation_loss_nats_per_token"]["left_to_right"] < 6


def test_stopped_and_resumed_training_ends_where_uninterrupted_training_does(text, tmp_path):
    def settings(name, **overrides):
        return TrainingSettings(
            text=str(text), output=tmp_path / name, steps=12, evaluate_every=6, **{**TINY, "dropout": 0.1, **overrides}
        )

    through = train(settings("through"))
    # A run that is killed after its first checkpoint leaves what a shorter run of the same schedule leaves.
    train(settings("stopped"))
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "checkpoint-12")
    resumed = train(settings("stopped", resume=True))
    key = "validation_loss_nats_per_token"
    assert resumed[key] == pytest.approx(through[key], rel=1e-6)


@pytest.mark.slow
def test_two_processes_get_the_loss_of_one(text, tmp_path):
    """`accelerate launch` on two CPU processes (gloo), half the batch each: the same steps, so the same losses."""

    def launch(processes, batch_size):
        output = tmp_path / str(processes)
        flags = ["--steps", "8", "--evaluate-every", "8", *FLAGS, "--batch-size", str(batch_size), "--seed", "3"]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        # accelerate's name for "several processes on this machine"; ACCELERATE_USE_CPU makes them gloo's.
        command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
        command += ["-m", "hf_diffusion.cli", "train", "--text", str(text), "--output", str(output), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        state = json.loads((output / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
        evaluated = {
            key: value
            for entry in state["log_history"]
            for key, value in entry.items()
            if re.fullmatch(r"eval_.*_loss", key)
        }
        return evaluated, json.loads((output / "results.json").read_text())

    (alone, results_alone), (together, results_together) = launch(1, 4), launch(2, 2)
    assert results_alone["training_tokens"] == results_together["training_tokens"]
    assert together == pytest.approx(alone, rel=1e-4)
    losses = "validation_loss_nats_per_token"
    assert results_together[losses] == pytest.approx(results_alone[losses], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "`steps` must be at least 1"),
        (["--family", "gpt"], "`family` must be armd or llama"),
        (["--max-shuffled", "0"], "`max_shuffled` must be at least 1"),
        (["--validation-fraction", "1"], "`validation_fraction` must be between 0 and 1"),
        (["--text", "nowhere.txt"], "'nowhere.txt' is not a file"),
        (["--steps", "100", "--warmup-steps", "90"], "`warmup_steps` (90) and the decay (20 steps) do not fit"),
        (["--block-length", "4"], "`block_length` must be at least the most streams validated (8)"),
        (["--vocab-size", "100"], "`vocab_size` must be at least 258"),
    ],
    ids=["steps", "family", "rho", "fraction", "text", "warm-up", "length", "vocabulary"],
)
def test_wrong_flags_are_refused_and_nothing_is_written(flags, message, text, tmp_path, capsys):
    output = tmp_path / "model"
    assert main(["train", "--text", str(text), "--output", str(output), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
