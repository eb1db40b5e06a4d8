"""Model cards: what is known is said, what is not is said to be not, and no card is overwritten."""

import json

import pytest
from families import FAMILIES
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from hf_diffusion import ARMDForMaskedDiffusion
from hf_diffusion.cli import main
from hf_diffusion.hub import Evaluation, ModelCardFacts
from hf_diffusion.hub.model_card import make_model_card
from hf_diffusion.training.families import FAMILIES as RECIPES
from hf_diffusion.training.run import train


@pytest.fixture
def model():
    return FAMILIES["armd"].model()


def section(text, title):
    return text.split(f"## {title}\n\n")[1].split("\n## ")[0].strip()


def test_what_is_not_known_is_said_to_be_not(model, tmp_path):
    model.save_pretrained(tmp_path / "small", include_code=True)
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.license is None
    assert {"masked-diffusion", "armd"} <= set(card.data.tags)
    assert section(card.text, "Training data") == section(card.text, "Evaluation") == "Not known."
    assert section(card.text, "Licence") == "Of the weights: not known. Of the code: apache-2.0."
    assert "There was no tokenizer in the folder" in section(card.text, "Use")
    assert 'from_pretrained("small", trust_remote_code=True)' in card.text
    assert "https://arxiv.org/abs/2601.16971" in card.text


def test_what_is_given_is_said():
    facts = ModelCardFacts(
        name="someone/model",
        license="mit",
        training_data="Letters.",
        evaluations=[Evaluation(1.25, "bound", 0.5, estimator="NELBO", nfe=8, data="a page"), Evaluation(3.0, "other")],
        tags=["letters"],
    )
    card = make_model_card(ARMDForMaskedDiffusion, facts, has_tokenizer=True)
    assert (card.data.license, "letters" in card.data.tags) == ("mit", True)
    assert section(card.text, "Training data") == "Letters."
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line[:1] == "|"]
    assert rows[2:] == [
        ["bound", "1.250 ± 0.500", "NELBO", "8", "a page"],
        ["other", "3.000", "not known", "not known", "not known"],
    ]
    assert "no tokenizer" not in card.text


class TestNoCardIsOverwritten:
    def test_by_saving(self, model, tmp_path):
        (tmp_path / "README.md").write_text("mine")
        with pytest.raises(FileExistsError, match="README.md exists already"):
            model.save_pretrained(tmp_path, include_code=True, model_card=ModelCardFacts(license="mit"))
        assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
        model.save_pretrained(tmp_path, include_code=True)
        assert (tmp_path / "README.md").read_text() == "mine"
        assert (tmp_path / "auto_map.py").exists()

    def test_by_exporting(self, model, tmp_path, capsys):
        model.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "README.md").write_text("mine")
        arguments = ["export", str(tmp_path / "model"), str(tmp_path / "out")]
        assert main([*arguments, "--license", "mit"]) == 2
        assert "`license` would have no effect" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert main(arguments) == 0
        assert (tmp_path / "out" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_card": ModelCardFacts()}, "`model_card` has no effect"),
        ({"include_code": True, "push_to_hub": True}, "would upload the folder before"),
    ],
)
def test_arguments_without_effect_are_refused(arguments, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_saved_without_code(model, tmp_path):
    model.save_pretrained(tmp_path / "model", include_code=True)
    model = AutoModel.from_pretrained(tmp_path / "model")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Merge it into it first"):
        model.save_pretrained(tmp_path / "out", include_code=True)
    model.save_pretrained(tmp_path / "out")
    assert {file.suffix for file in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".md"}


def test_a_model_inside_that_of_peft_is_saved_with_code_once_it_is_merged(model, tmp_path):
    adapted = get_peft_model(model, LoraConfig())
    with pytest.raises(ValueError, match="merge_and_unload"):
        adapted.get_base_model().save_pretrained(tmp_path / "out", include_code=True)
    assert not (tmp_path / "out").exists()
    adapted.merge_and_unload().save_pretrained(tmp_path / "out", include_code=True)
    assert (tmp_path / "out" / "auto_map.py").exists()
    AutoModel.from_pretrained(tmp_path / "out")  # which refuses tensors that have no place


@pytest.mark.parametrize("family", ["armd", "lomdm"])
def test_a_trained_folder_is_exported_with_what_training_left(family, tmp_path, capsys):
    text = tmp_path / "private place" / "plays.txt"
    text.parent.mkdir()
    text.write_text("To be, or not to be: that is the question. " * 60)
    own = {"validation_draws": 4} if family == "lomdm" else {"max_shuffled": 8}
    results = train(
        RECIPES[family](
            text=str(text),
            output=tmp_path / "trained",
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            text_length=32,
            batch_size=4,
            steps=4,
            warmup_steps=2,
            **own,
        )
    )
    command = ["export", str(tmp_path / "trained"), str(tmp_path / "out"), "--license", "mit"]
    assert main(command) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"README.md", "tokenizer.json", "model.safetensors", "auto_map.py", "generation_config.json"} <= names
    assert not {"results.json", "checkpoints"} & names
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("trained", "out")]
    assert weights[0] == weights[1]
    assert AutoModel.from_pretrained(tmp_path / "out").num_parameters() == results["parameters"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "private place" not in card
    assert "`plays.txt`" in section(card, "Training data")
    assert "no tokenizer" not in card
    for name, loss in results["validation_loss_nats_per_token"].items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name.replace('_', ' ')} |"))
        assert f" {loss:.3f}" in row
        assert ("| 4 |" if family == "lomdm" else "| 1 |") in row  # draws
        assert ("upper bound" if family == "lomdm" else "exact in the order named") in row
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["weights", "config"])
def test_a_failed_export_leaves_nothing(broken, model, tmp_path, capsys, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    if broken == "weights":
        (tmp_path / "model" / "model.safetensors").unlink()
    else:
        (tmp_path / "model" / "results.json").write_text(json.dumps({}))
        (tmp_path / "model" / "config.json").write_text("{}")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
