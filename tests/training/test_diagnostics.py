"""What a LoMDM says about its order while it is trained."""

import json
import math

import pytest
import torch
from tiny_mdlm import text, tiny_lomdm

from hf_diffusion.cli import main
from hf_diffusion.diffusion.order_diagnostics import diagnostics
from hf_diffusion.training.diagnostics import PREFIX, plot_diagnostics


WORDS = "the king speaks and all men hear him now\n" * 400


def test_they_are_in_the_logs_and_in_a_picture(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS)
    flags = "--family lomdm --steps 20 --evaluate-every 10 --warmup-steps 2 --hidden-size 32 --num-hidden-layers 2"
    flags += " --num-attention-heads 2 --text-length 32 --batch-size 4 --vocab-size 300 --validation-draws 2"
    arguments = ["train", "--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "model"), *flags.split()]
    assert main(arguments) == 0
    folder = tmp_path / "model" / "checkpoints"
    history = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert 0 <= entry[PREFIX + "exponent_std"] < 0.65
        assert 0 < entry[PREFIX + "order_entropy"] <= 1 + 1e-6
        assert -1 <= entry[PREFIX + "confidence_correlation"] <= 1
        assert entry[PREFIX + "copy_difference"] > 0
    assert not any(key.startswith(PREFIX) for entry in history if "loss" not in entry for key in entry)
    assert (folder / "diagnostics.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_of_nothing(tmp_path):
    assert not plot_diagnostics([{"step": 1, "loss": 2.0}], tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_a_model_without_an_order_has_none():
    model, ids = tiny_lomdm().train(), text(4, 8)
    for head in (model.forward_scheduler, model.reverse_scheduler):
        torch.nn.init.zeros_(head.out_proj.weight)
    described = {name: float(value) for name, value in model(ids, labels=ids).diagnostics.items()}
    for name in ("exponent_std", "reverse_exponent_std", "order_kl", "timing_cost", "confidence_correlation"):
        assert described[name] == pytest.approx(0, abs=1e-12)
    assert described["order_entropy"] == pytest.approx(1)


def test_numbers_of_two_masked_positions():
    exponents, reverse = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[[1.0, 1.0, 9.0]]])
    masked, to_predict = torch.tensor([[[True, True, False]]]), torch.tensor([[True, True, True]])
    log_probs = torch.tensor([[[-1.0, -2.0, 5.0]]])
    described = diagnostics(log_probs, exponents, reverse, masked, torch.tensor([[6.0]]), to_predict)
    assert float(described["exponent_std"]) == pytest.approx(math.sqrt(2 / 3))
    assert float(described["reverse_exponent_std"]) == 0
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert float(described["order_entropy"]) == pytest.approx(entropy / math.log(2))
    assert float(described["confidence_correlation"]) == pytest.approx(-1)
    assert float(described["order_kl"]) == pytest.approx(math.log(2) - entropy)
    assert float(described["timing_cost"]) == pytest.approx(0.5 - 1 - math.log(0.5))
    assert "copy_difference" not in described
    assert float(
        diagnostics(
            *(
                value.expand(2, -1, -1) if value.ndim == 3 else value
                for value in (log_probs, exponents, reverse, masked)
            ),
            torch.tensor([[6.0], [3.0]]),
            to_predict,
        )["copy_difference"]
    ) == pytest.approx(1.0)
