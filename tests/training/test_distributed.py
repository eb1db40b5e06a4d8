"""`accelerate launch` on two CPU processes: the same losses as alone, sharded checkpoints, killed and resumed."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from transformers import AutoModel

from hf_diffusion.cli import main


WORDS = ["the", "king", "speaks", "and", "all", "men", "hear", "him", "now", "\n"]
SETTINGS = {
    "vocab-size": 300,
    "hidden-size": 32,
    "num-hidden-layers": 2,
    "num-attention-heads": 2,
    "text-length": 32,
    "warmup-steps": 2,
    "validation-texts": 4,
    "seed": 3,
}
OWN = {"armd": {"max-shuffled": 8}, "lomdm": {"validation-draws": 2}}
# accelerate's name for "several processes on this machine"; ACCELERATE_USE_CPU makes them gloo's.
DDP = ["--multi_gpu"]
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP2 += ["--fsdp_state_dict_type", "SHARDED_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "false"]
KINDS = {"ddp": DDP, "fsdp2": FSDP2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(WORDS[i] for i in torch.randint(10, (20_000,), generator=generator)))
    return path


def arguments(family, text, output, *switches, **settings):
    settings = {**SETTINGS, **OWN[family], "family": family, **settings}
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["train", "--text", str(text), "--output", str(output), *switches, *options]


def start(kind, family, text, output, *switches, **settings):
    """Begin to train on a batch of four texts, two in each of two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *KINDS[kind]]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(Path(__file__).with_name("fsdp_on_cpu.py"))] if kind == "fsdp2" else ["-m", "hf_diffusion.cli"]
    command += arguments(family, text, output, *switches, batch_size=2, **settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with Path(f"{output}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def train(kind, family, text, output, *switches, **settings):
    process = start(kind, family, text, output, *switches, **settings)
    try:
        assert process.wait(timeout=300) == 0, Path(f"{output}.log").read_text()[-3000:]
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return final_losses(output)


def train_alone(family, text, output, **settings):
    """The same batch in this process."""
    assert main(arguments(family, text, output, batch_size=4, **settings)) == 0
    return final_losses(output)


def final_losses(output):
    return json.loads((output / "results.json").read_text())["validation_loss_nats_per_token"]


def kill(process):
    """SIGKILL for the launcher and everything that it has started: nobody can tidy up."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family)


def losses_while_training(output, step):
    state = json.loads((output / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return {
        key: value
        for entry in state["log_history"]
        for key, value in entry.items()
        if key in ("loss", "grad_norm") or re.fullmatch(r"eval_.*_loss", key)
    }


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_layers_to_be_sharded_are_in_the_model(family):
    # Accelerate raises for a name that it does not find.
    model = family.model()
    names = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules <= names
    assert {name for name in names if name.endswith("Layer")} == model._no_split_modules


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "learning_rate", "kinds"),
    # Each process of LoMDM, which has MDLM's layers and its own, draws its own masks, so only what no step has changed
    # can be the same.
    [("armd", 1.5e-3, ["ddp", "fsdp2"]), ("lomdm", 1e-12, ["fsdp2"])],
)
def test_two_processes_get_the_loss_of_one(family, learning_rate, kinds, text, tmp_path):
    settings = {"steps": 10, "evaluate_every": 10, "learning_rate": learning_rate}
    alone = train_alone(family, text, tmp_path / "alone", **settings)
    for kind in kinds:
        assert train(kind, family, text, tmp_path / kind, **settings) == pytest.approx(alone, rel=1e-4)
        if family == "armd":
            while_training = losses_while_training(tmp_path / kind, 10)
            assert "loss" in while_training
            assert while_training == pytest.approx(losses_while_training(tmp_path / "alone", 10), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_killed_in_mid_epoch_and_resumed_training_ends_where_uninterrupted_training_does(kind, text, tmp_path):
    settings = {"steps": 24, "evaluate_every": 6, "dropout": 0.1}
    losses = train(kind, "armd", text, tmp_path / "through", **settings)
    output = tmp_path / "killed"
    process = start(kind, "armd", text, output, **settings)
    while not (output / "checkpoints" / "checkpoint-12").exists():  # the moment at which it begins to be written
        assert process.poll() is None, Path(f"{output}.log").read_text()[-3000:]
        time.sleep(0.01)
    kill(process)
    checkpoints = {path.name for path in (output / "checkpoints").glob("checkpoint-*")}
    assert "checkpoint-6" in checkpoints
    assert "checkpoint-24" not in checkpoints
    assert not (output / "model.safetensors").exists()
    if kind == "fsdp2":  # every process has written its own part
        assert len(list((output / "checkpoints/checkpoint-6/pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    assert train(kind, "armd", text, output, "--resume", **settings) == pytest.approx(losses, rel=1e-6)
    weights = load_file(output / "model.safetensors")
    torch.testing.assert_close(weights, load_file(tmp_path / "through" / "model.safetensors"), rtol=0, atol=1e-6)
    assert set(weights) == set(AutoModel.from_pretrained(output).state_dict()) - {"lm_head.weight"}
