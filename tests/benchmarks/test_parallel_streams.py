"""What the benchmarks of parallel streams print, on a small model: seeds of a recipe, and texts with mended seams."""

import json
import math
import sys

import causal_lm
import pytest
import torch
from byte_judge import save_byte_judge
from peft import LoraConfig, get_peft_model
from stream_samples import DRAFT, Writer, judged
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_diffusion.conversion import from_causal_lm
from hf_diffusion.diffusion import orders
from hf_diffusion.evaluation import Judge


LENGTH, NUM_STREAMS = 48, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return save_byte_judge(tmp_path_factory.mktemp("model"))


def save_adapter(folder, seed, output):
    torch.manual_seed(seed)
    causal = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(from_causal_lm(causal, gap_token_id=0), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(output)
    return str(output)


def first_number(cell):
    return float(cell.split(" ± ")[0])


def test_adapters_of_one_recipe_are_a_row_of_means(folder, tmp_path, monkeypatch, capsys):
    first, second = (save_adapter(folder, seed, tmp_path / f"seed-{seed}") for seed in (1, 2))
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 8)
    arguments = ["causal_lm.py", folder, str(tmp_path / "text.txt"), "--num-windows", "2", "--window-length", "24"]
    arguments += ["--num-streams", "1", "3", "--adapter", first, "--adapter", second, "--adapter", first, second]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(tmp_path / "results.json")])
    causal_lm.main()
    capsys.readouterr()
    rows = json.loads((tmp_path / "results.json").read_text())[0]["table"]
    rows = {(row["model"].removeprefix("wrap, first, "), row["S"]): row for row in rows}
    assert all(first_number(row["excess"]) == 0 for (_, count), row in rows.items() if count == 1)
    alone, both = (rows["seed-1", 3], rows["seed-2", 3]), rows["seed-1, seed-2", 3]
    values = [first_number(row["excess"]) for row in alone]
    assert values[0] != values[1]
    assert first_number(both["excess"]) == pytest.approx(sum(values) / 2, abs=1e-3)
    assert float(both["over seeds"].split(" ± ")[1]) == pytest.approx(abs(values[0] - values[1]) / 2, abs=1e-3)
    assert alone[0]["over seeds"] == ""


@pytest.fixture(scope="module")
def writer(folder):
    model = from_causal_lm(folder, gap_token_id=0).eval()
    prompts = torch.randint(256, (2, 5), generator=torch.Generator().manual_seed(1))
    return Writer(model, prompts, LENGTH)


def test_a_revision_changes_the_beginnings_of_later_streams_alone(writer):
    texts, _ = writer.write(NUM_STREAMS)
    revised, passes = writer.revise(texts, NUM_STREAMS, 4)
    assert passes == 2 + 4 - 1  # two heads, and three tokens more
    places = [5 + 16 + n for n in range(4)] + [5 + 32 + n for n in range(4)]
    changed = (texts != revised).any(dim=0).nonzero()[:, 0].tolist()
    assert set(changed) <= set(places)
    assert len(changed) > len(places) // 2
    assert (revised < 256).all()


def test_every_stream_keeps_the_draft_that_goes_on_best(writer):
    drafts = [writer.write(NUM_STREAMS, seed)[0] for seed in range(3)]
    best, _ = writer.best_of(3, NUM_STREAMS)
    assert torch.equal(best[:, :5], writer.prompts)
    steps = torch.cat([torch.full((4,), -1), orders.strided_steps(LENGTH, NUM_STREAMS)])
    nats = [causal_lm.negative_log_likelihood(writer.model, draft, steps) for draft in drafts]
    kept = set()
    for row in range(len(best)):
        for start in (5, 21, 37):
            # Of the second to the last token of a draft; nats are of all tokens but a text's first.
            costs = [of_draft[row, start : start + DRAFT - 1].sum() for of_draft in nats]
            number = costs.index(min(costs))
            kept.add(number)
            beginning = slice(start, start + DRAFT)
            assert torch.equal(best[row, beginning], drafts[number][row, beginning])
    assert len(kept) > 1


def test_a_uniform_judge_counts_bytes(tmp_path, writer, folder):
    judge_folder = save_byte_judge(tmp_path, is_uniform=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    judge = Judge(
        AutoModelForCausalLM.from_pretrained(judge_folder).eval(), AutoTokenizer.from_pretrained(judge_folder)
    )
    texts = torch.tensor(tokenizer(["a" * 53, "b" * 53])["input_ids"])
    whole, at_seams = judged(judge, tokenizer, texts, 5, writer.starts(NUM_STREAMS))
    assert first_number(whole) == pytest.approx(math.log(256), abs=1e-3)
    assert first_number(at_seams) == pytest.approx(math.log(256), abs=1e-3)
