"""The comparison: what must be equal is equal, the baseline is scored as it was trained, and nothing is done twice."""

import json
import re
from importlib.util import find_spec

import compare
import pytest
import torch
from byte_judge import save_byte_judge
from comparison import summary
from comparison.models import AutoregressiveScorer, make_recipe
from comparison.parts import check_settings, part
from comparison.presets import PRESETS
from torch.nn import functional as F

from hf_diffusion import MDLMARConfig, MDLMARForCausalLM
from hf_diffusion.evaluation import evaluate_text
from hf_diffusion.training.data import TokenTexts, train_tokenizer


TEXT = "".join(f"{number} {number * number % 97} the quick brown fox counts on.\n" for number in range(300))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "text.txt").write_text(TEXT)
    train_tokenizer([TEXT], 300).save_pretrained(folder / "tokenizer")
    return {"text": str(folder / "text.txt"), "tokenizer": str(folder / "tokenizer"), "output": folder / "model"}


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "smoke"])
def test_models_have_the_same_size_to_two_percent(preset, places):
    settings = PRESETS[preset]
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.add_tokens([f"<{number}>" for number in range(settings.shared["vocab_size"] - 300)])
    counts = {}
    for name in ("autoregressive", "mdlm", "lomdm", "armd", "armd_paper"):
        with torch.device("meta"):
            counts[name] = make_recipe(name, 0, settings, **places).build_model(tokenizer).num_parameters()
    assert max(counts.values()) < 1.02 * min(counts.values()), counts


def test_all_models_train_alike_and_read_the_same_texts_in_the_same_order(places, tmp_path, monkeypatch):
    read, get = {}, TokenTexts.__getitem__
    for name in ("autoregressive", "mdlm", "armd"):
        order = read.setdefault(name, [])

        def noted(texts, index, order=order):
            order.append(get(texts, index)["input_ids"].tolist())
            return get(texts, index)

        recipe = make_recipe(name, 3, PRESETS["smoke"], **{**places, "output": tmp_path / name})
        recipe.evaluate_every = 100
        monkeypatch.setattr(TokenTexts, "__getitem__", noted)
        monkeypatch.setattr(type(recipe), "evaluations", lambda *arguments: {})
        compare.train(recipe)
    num_read = PRESETS["smoke"].shared["steps"] * PRESETS["smoke"].shared["batch_size"]
    first = read["autoregressive"][:num_read]
    assert len({tuple(text) for text in first}) > num_read // 2
    assert read["mdlm"][:num_read] == read["armd"][:num_read] == first


def test_the_baseline_predicts_every_token_after_its_start_symbol(places):
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT], 300)
    config = MDLMARConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
        initializer_range=0.3,
    )
    model = MDLMARForCausalLM(config).eval()
    ids = tokenizer(TEXT[:60])["input_ids"]
    scored = evaluate_text(AutoregressiveScorer(model), tokenizer, TEXT[:60], batch_size=2)
    total = 0.0
    for start in range(0, len(ids), 12):
        window = torch.tensor([[tokenizer.eos_token_id, *ids[start : start + 12]]])
        with torch.no_grad():
            total -= float(F.cross_entropy(model(window).logits[0, :-1], window[0, 1:], reduction="sum"))
    assert scored.log_likelihood == pytest.approx(total, rel=1e-5)
    assert (scored.is_exact, scored.num_tokens) == (True, len(ids))


def test_a_part_is_done_once_and_an_unfinished_one_again(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {"number": len(calls)}

    with pytest.raises(KeyboardInterrupt):
        part(tmp_path / "parts" / "one.json", compute)
    assert [part(tmp_path / "parts" / "one.json", compute)["number"] for _ in range(3)] == [2, 2, 2]


def test_a_folder_holds_one_comparison(tmp_path):
    check_settings(tmp_path, PRESETS["smoke"], {"training": "a"})
    check_settings(tmp_path, PRESETS["smoke"], {"training": "a"})
    with pytest.raises(ValueError, match="another preset"):
        check_settings(tmp_path, PRESETS["cpu"], {"training": "a"})
    with pytest.raises(ValueError, match="another texts"):
        check_settings(tmp_path, PRESETS["smoke"], {"training": "b"})


def test_one_command_runs_it_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    for name in ("train", "valid", "test"):
        (tmp_path / name).write_text(TEXT)
    texts = [str(tmp_path / name) for name in ("train", "valid", "test")]
    command = ["compare.py", *texts, "--output", str(tmp_path / "out"), "--preset", "smoke", "--seeds", "1"]
    command += ["--models", "autoregressive", "armd", "armd_strided"]
    monkeypatch.setattr("sys.argv", command)
    compare.main()
    monkeypatch.setattr(compare, "train", lambda recipe: pytest.fail("trained again"))
    judge = []
    if find_spec("mauve"):
        judge = ["--judge", save_byte_judge(tmp_path / "judge", is_uniform=True)]
    monkeypatch.setattr("sys.argv", [*command, "--test", *judge])
    capsys.readouterr()
    compare.main()
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    nats = found["validation-armd_strided-1"]["S=4"]["figures"]["nats_per_token"]["value"]
    base = found["validation-armd_strided-1"]["left to right"]["figures"]["nats_per_token"]["value"]
    assert f"| {nats - base:.3f} |" in printed
    # The same text, exact on both sides.
    assert found["test-armd-1"]["left to right"]["figures"] == found["validation-armd-1"]["left to right"]["figures"]
    assert (tmp_path / "out" / "curves.svg").is_file()
    read = [found[f"train-{name}-1"]["training_tokens"] for name in ("armd", "armd_strided")]
    assert f"| ARMD, after the strided phase | 1 | {found['train-armd-1']['parameters']:,} | {sum(read):,} |" in printed
    assert f"| {found['validation-armd-1']['left to right']['figures']['bits_per_byte']['value']:.3f} |" in printed
    assert re.search(r"\| [0-9.]+ \(step 4\) \| [0-9.]+ \(step 4\) \| [0-9.]+ \(step 8\) \|", printed)
    assert "| tokens per CPU second |" in printed
    if judge:
        assert "### Generation, judged by judge-" in printed
        for series in ("autoregressive", "ARMD, S=1", "ARMD, S=4", "the validation text itself"):
            assert re.search(rf"\| {series} \| (1.0)? \| 256 \| [0-9.]+ \| [0-9.]+ \| [0-9.]* \| 0 \|", printed)
        assert (tmp_path / "out" / "frontier.svg").is_file()


def test_mean_and_spread_over_seeds():
    assert summary.mean_and_spread([]) == ""
    assert summary.mean_and_spread([1.5]) == "1.50"
    assert summary.mean_and_spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert summary.mean_and_spread([1.5], errors=[0.25]) == "1.50 (0.25)"
    assert summary.mean_and_spread([1.0, 3.0], errors=[0.25, 0.5], digits=3) == "2.000 ± 1.414 (0.375)"
