"""The likelihood of a long text: windows against the model read by hand, resumption, and what the command prints."""

import json
import math
import re

import peft
import pytest
import torch
from families import FAMILIES
from tiny_mdlm import tiny, tiny_lomdm
from transformers import AutoTokenizer

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.cli import main
from hf_diffusion.evaluation import environment, evaluate_text
from hf_diffusion.evaluation.windows import cut_windows


TEXT = "KING HENRY.\nWhat says the lord?\n\nFALSTAFF.\nBanish plump Jack, and banish all the world. What, no more?\n"


class Letters:
    """A tokenizer of ten letters, a token each; the rest is unknown."""

    unk_token_id = 10

    def __call__(self, text, **arguments):
        assert arguments == {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return {"input_ids": [min(ord(letter) - ord("a"), 10) if letter >= "a" else 10 for letter in text]}


@pytest.fixture(scope="module")
def armd():
    return FAMILIES["armd"].model_class.from_pretrained(ARMD_SHAKESPEARE).double()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)


@torch.no_grad()
def by_hand(model, ids, first, last, start):
    """Log-likelihood in nats of the tokens `first` to `last`, given those from `start`, left to right in one pass."""
    text = torch.tensor([ids[start:last]])
    chosen = model(text).logits.log_softmax(-1).gather(-1, text[..., None])[0, :, 0]
    return float(chosen[first - start :].sum())


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 30, 31])
@pytest.mark.parametrize(("length", "stride"), [(8, None), (8, 7), (8, 4), (8, 1), (1, None), (40, 3)])
def test_windows_score_every_token_once_and_are_never_too_long(num_tokens, length, stride):
    windows = cut_windows(num_tokens, length, stride)
    scored = [n for window in windows for n in range(window.scored_from, window.end)]
    assert scored == list(range(num_tokens))
    for window in windows:
        assert 0 <= window.start <= window.scored_from < window.end
        assert window.end - window.start <= length
    for window in windows[1:]:
        given = window.scored_from - window.start
        assert given == 0 if stride is None else given >= length - stride
        assert stride is None or window.end - window.start == length


@pytest.mark.parametrize(
    ("stride", "windows"),
    [
        (None, [(0, 12, 0), (12, 24, 12), (24, 36, 24)]),
        (11, [(0, 12, 0), (12, 23, 11), (23, 34, 22)]),  # one token given: lm-eval's rolling windows
        (5, [(0, 12, 0), (12, 17, 5), (17, 22, 10)]),
    ],
)
def test_a_text_is_the_sum_of_its_windows(armd, tokenizer, stride, windows):
    ids = tokenizer(TEXT)["input_ids"][: windows[-1][1]]
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == ids
    result = evaluate_text(armd, tokenizer, text, window=12, stride=stride, batch_size=2)
    expected = sum(by_hand(armd, ids, first, last, start) for first, last, start in windows)
    assert result.log_likelihood == pytest.approx(expected, abs=1e-9)
    assert (result.num_tokens, result.num_windows, result.is_exact) == (len(ids), len(windows), True)
    assert result.standard_error is None
    figures = {name: figure["value"] for name, figure in result.figures().items()}
    assert figures["perplexity"] == pytest.approx(math.exp(-expected / len(ids)))
    words = len(re.findall(r"\S+|\n", text))
    assert figures["word_perplexity"] == pytest.approx(math.exp(-expected / words))
    assert figures["bits_per_byte"] == pytest.approx(-expected / math.log(2) / len(text.encode("utf-8")))


def test_bytes_are_not_letters_and_words_have_line_ends(armd, tokenizer):
    result = evaluate_text(armd, tokenizer, "é 你\n\n a")
    assert (result.num_bytes, result.num_words) == (2 + 1 + 3 + 2 + 2, 3 + 2)


@pytest.mark.parametrize("make", [tiny, tiny_lomdm])
def test_a_bound_has_a_standard_error_and_does_not_depend_on_the_batch(make):
    model, text = make(max_position_embeddings=8), "abcdefghij" * 4
    results = [evaluate_text(model, Letters(), text, batch_size=size, num_draws=4, seed=3) for size in (1, 3)]
    assert results[0].log_likelihood == pytest.approx(results[1].log_likelihood, rel=1e-9)
    assert results[0].standard_error == pytest.approx(results[1].standard_error, rel=1e-9)
    assert not results[0].is_exact
    assert results[0].sampler == 'generate(strategy="first_hitting")'
    by_window = [
        model.score(torch.tensor([Letters()(text, **TOKENS)["input_ids"][n : n + 8]]), num_draws=4, seed=3 + n // 8)
        for n in range(0, 40, 8)
    ]
    assert results[0].log_likelihood == pytest.approx(sum(float(part.log_likelihood) for part in by_window))
    variance = sum(float(part.standard_error) ** 2 for part in by_window)
    assert results[0].standard_error == pytest.approx(variance**0.5)
    figure = results[0].figures()["nats_per_token"]
    assert figure["standard_error"] == pytest.approx(variance**0.5 / 40)


TOKENS = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}


@pytest.mark.parametrize("stride", [None, 3])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(stride):
    for make in (tiny, tiny_lomdm):
        model = make(max_position_embeddings=8)
        for weight in model.lm_head.parameters():
            weight.data.zero_()
        if model.learns_order:
            for head in (model.forward_scheduler, model.reverse_scheduler):
                head.out_proj.weight.data.zero_()
        figures = evaluate_text(model, Letters(), "abcab" * 5, stride=stride, num_draws=2).figures()
        assert figures["perplexity"]["value"] == pytest.approx(11)
        assert figures["bits_per_byte"]["value"] == pytest.approx(math.log2(11))


def test_what_is_left_at_the_end_has_as_many_streams_as_tokens(armd, tokenizer):
    ids = tokenizer(TEXT)["input_ids"][:19]
    settings = {"strategy": "strided", "num_streams": 4}
    result = evaluate_text(armd, tokenizer, tokenizer.decode(ids), window=8, **settings)
    whole, rest = torch.tensor(ids[:16]).view(2, 8), torch.tensor([ids[16:]])
    expected = float(armd.score(whole, **settings).log_likelihood.sum() + armd.score(rest).log_likelihood.sum())
    assert result.log_likelihood == pytest.approx(expected, abs=1e-9)


def test_in_windows_that_overlap_the_streams_are_of_what_is_scored(armd, tokenizer):
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:15]])
    settings = {"strategy": "strided", "num_streams": 4}
    result = evaluate_text(armd, tokenizer, tokenizer.decode(ids[0]), window=8, stride=5, **settings)
    expected = 0.0
    for start, end, num_given, num_streams in ((0, 8, 0, 4), (5, 13, 3, 4), (7, 15, 6, 2)):
        text = ids[:, start:end]
        labels = text.masked_fill(torch.arange(8) < num_given, -100)
        of_window = armd.score(text, labels=labels, strategy="strided", num_streams=num_streams)
        expected += float(of_window.log_likelihood)
    assert result.log_likelihood == pytest.approx(expected, abs=1e-9)
    assert result.sampler == 'generate(strategy="strided", num_streams=4)'


def test_one_token_is_scored_and_what_the_tokenizer_cannot_spell_is_counted():
    assert evaluate_text(tiny(), Letters(), "a").num_tokens == 1
    assert evaluate_text(tiny(), Letters(), "a-b!").num_unknown_tokens == 2


def test_an_interrupted_evaluation_goes_on_where_it_was(armd, tokenizer, tmp_path, monkeypatch):
    whole = evaluate_text(armd, tokenizer, TEXT, window=6, batch_size=2)
    parts, calls, score = tmp_path / "parts", [], armd.score

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    monkeypatch.setattr(armd, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_text(armd, tokenizer, TEXT, window=6, batch_size=2, parts_file=parts)
    assert len(parts.read_text().splitlines()) == 1 + 4
    with parts.open("a") as file:
        file.write("[4, {'log_lik")  # what a crash leaves of a line
    result = evaluate_text(armd, tokenizer, TEXT, window=6, batch_size=2, parts_file=parts)
    assert len(calls) == 1 + whole.nfe  # a pass for each call, and the one that was interrupted
    assert result == whole
    assert evaluate_text(armd, tokenizer, TEXT, window=6, batch_size=2, parts_file=parts) == whole
    assert len(calls) == 1 + whole.nfe  # until the file is deleted, nothing is done again


@pytest.mark.parametrize("left", ["", '{"text": "5891b5b'])
def test_what_was_cut_off_in_its_first_line_is_begun_anew(armd, tokenizer, tmp_path, left):
    parts = tmp_path / "parts"
    parts.write_text(left)
    result = evaluate_text(armd, tokenizer, TEXT, window=6, parts_file=parts)
    assert result == evaluate_text(armd, tokenizer, TEXT, window=6)
    assert len(parts.read_text().splitlines()) == 1 + result.num_windows


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"window": 7}, "window"), ({"stride": 2}, "stride"), ({"strategy": "first_hitting"}, "settings")],
)
def test_parts_of_other_settings_are_refused(armd, tokenizer, tmp_path, monkeypatch, changed, named):
    parts = tmp_path / "parts"
    monkeypatch.setattr(armd, "score", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate_text(armd, tokenizer, TEXT, window=6, parts_file=parts)
    with pytest.raises(ValueError, match=f"other settings .{named}."):
        evaluate_text(armd, tokenizer, TEXT, **{"window": 6, **changed}, parts_file=parts)
    with torch.no_grad():
        armd.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="other settings .model."):
        evaluate_text(armd, tokenizer, TEXT, window=6, parts_file=parts)
    with torch.no_grad():
        armd.lm_head.weight[0, 0] -= 1e-3


def test_parts_of_another_configuration_or_version_are_refused(tmp_path, monkeypatch):
    model, parts = tiny_lomdm(max_position_embeddings=8), tmp_path / "parts"
    settings = {"num_draws": 2, "estimator": "power_time", "parts_file": parts}
    kept = evaluate_text(model, Letters(), "abcdefghij", **settings)
    model.config.name_or_path = "elsewhere"
    assert evaluate_text(model, Letters(), "abcdefghij", **settings) == kept
    with monkeypatch.context() as patched:
        patched.setattr("hf_diffusion.__version__", "0.0.1")
        with pytest.raises(ValueError, match="other settings .model."):
            evaluate_text(model, Letters(), "abcdefghij", **settings)
    model.config.least_time = 0.3
    with pytest.raises(ValueError, match="other settings .model."):
        evaluate_text(model, Letters(), "abcdefghij", **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "`text` holds no token"),
        ({"window": 257}, "`window` .257. is more than the model's context .256"),
        ({"window": 0}, "`window` must be at least 1"),
        ({"window": 8, "stride": 8}, "`stride` must be at least 1 and less than the window of 8"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        (
            {"window": 16, "stride": 2, "strategy": "strided", "num_streams": 8},
            "`num_streams` .8. is more than the 2 tokens that are scored of a window. Lower it, or raise `stride`",
        ),
        ({"window": 4, "strategy": "strided", "num_streams": 8}, "raise `window`"),
        ({"temperature": 0.5}, "`temperature`=0.5 has no effect in `score`"),
    ],
)
def test_wrong_calls_are_refused(armd, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_text(armd, tokenizer, **{"text": TEXT, **arguments})


def test_the_command_prints_a_table_and_writes_what_it_depends_on(tmp_path, capsys, armd, tokenizer):
    (tmp_path / "text").write_text(TEXT)
    output = tmp_path / "out.json"
    flags = ["--text", str(tmp_path / "text"), "--strategy", "strided", "--num-streams", "2", "--window", "16"]
    assert main(["evaluate", *flags, "--dtype", "float64", "--json", str(output)]) == 0
    printed, written = capsys.readouterr().out, json.loads(output.read_text())
    expected = evaluate_text(armd, tokenizer, TEXT, window=16, strategy="strided", num_streams=2).figures()
    assert written["figures"]["nats_per_token"]["value"] == pytest.approx(expected["nats_per_token"]["value"], rel=1e-6)
    assert written["settings"] == {"strategy": "strided", "num_streams": 2}
    assert written["environment"] == json.loads(json.dumps(environment()))
    assert (written["seed"], written["is_exact"], written["dtype"]) == (0, True, "torch.float64")
    assert 'exact likelihood of generate(strategy="strided", num_streams=2)' in printed
    assert f"bits per byte: {expected['bits_per_byte']['value']:.4f}" in printed
    assert [path.name for path in tmp_path.glob("out.json*")] == ["out.json"]
    assert main(["evaluate", *flags[:2], "--strategy", "first_hitting", "--num-draws", "2", "--window", "16"]) == 0
    printed = capsys.readouterr().out
    assert 'bound of generate(strategy="first_hitting"), estimator orders' in printed
    assert re.search(r"perplexity: [\d.]+ ± [\d.]+", printed)


def test_the_command_takes_an_adapter(tmp_path, tokenizer):
    model = FAMILIES["armd"].model_class.from_pretrained(ARMD_SHAKESPEARE)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    lora.save_pretrained(tmp_path / "adapter")
    (tmp_path / "text").write_text(TEXT)
    flags = ["--text", str(tmp_path / "text"), "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", *flags, "--peft", str(tmp_path / "adapter")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["log_likelihood"]
    plain = evaluate_text(lora.get_base_model().eval(), tokenizer, TEXT)
    assert found == pytest.approx(plain.log_likelihood, abs=1e-3)
    merged = evaluate_text(lora.merge_and_unload().eval(), tokenizer, TEXT)
    assert found == pytest.approx(merged.log_likelihood, abs=1e-3)
    unchanged = FAMILIES["armd"].model_class.from_pretrained(ARMD_SHAKESPEARE)
    assert abs(found - evaluate_text(unchanged, tokenizer, TEXT).log_likelihood) > 0.1


def test_parts_are_kept_until_the_result_is_written(tmp_path, monkeypatch, armd):
    (tmp_path / "text").write_text(TEXT)
    output = tmp_path / "out.json"
    flags = ["evaluate", "--text", str(tmp_path / "text"), "--window", "16", "--json", str(output)]
    with monkeypatch.context() as patched:
        patched.setattr("hf_diffusion.cli.evaluate.environment", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(flags) == 130
    monkeypatch.setattr(type(armd), "score", lambda *args, **kwargs: pytest.fail("scored again"))
    assert main(flags) == 0
    assert "figures" in json.loads(output.read_text())
    assert [path.name for path in tmp_path.glob("out.json*")] == ["out.json"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Pass either `text`, a file, or `tasks`"),
        (["--text", "nowhere"], "nowhere"),
        (["--text", "nowhere", "--limit", "3"], "`limit`=3 has no effect with `text`"),
        (["--tasks", "lambada", "--stride", "3"], "`stride`=3 has no effect with `tasks`"),
        (["--text", "nowhere", "--json", "no/such/folder.json"], "there is no such folder"),
        (["--text", "nowhere", "--json", "."], "'.' is a folder. Name a file in it"),
        (["--text", "nowhere", "--device", "nowhere"], "`device`='nowhere' is not to be had here"),
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    assert main(["evaluate", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
