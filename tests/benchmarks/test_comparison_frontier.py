"""The comparison's frontier: the baseline is drawn from its own law, every point once, and every judge by itself."""

import json
from dataclasses import replace

import comparison.frontier
import pytest
import torch
from byte_judge import save_byte_judge
from comparison.frontier import Frontier, draw_autoregressively
from comparison.models import AutoregressiveScorer
from comparison.presets import PRESETS

from hf_diffusion import MDLMARConfig, MDLMARForCausalLM
from hf_diffusion.training.data import train_tokenizer


TEXT = "".join(f"{number} the quick brown fox counts on.\n" for number in range(99))


def make_baseline(vocab_size):
    torch.manual_seed(0)
    config = MDLMARConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=0,
        pad_token_id=0,
        mask_token_id=vocab_size - 1,
    )
    model = MDLMARForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


@torch.no_grad()
def test_the_baseline_is_drawn_as_it_is_scored():
    """At a temperature near 0 every text is what passes over the whole of it, from the start token, find likeliest."""
    baseline = make_baseline(24)
    greedy = torch.tensor([[baseline.config.eos_token_id]])
    for _ in range(12):
        likeliest = baseline(greedy, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        greedy = torch.cat([greedy, likeliest], dim=1)
    seconds = iter(range(100))
    drawn = draw_autoregressively(AutoregressiveScorer(baseline), 5, 12, 2, lambda: next(seconds), 1e-5)
    assert drawn.token_ids == 5 * [greedy[0, 1:].tolist()]
    assert (drawn.nfe, drawn.tokens_per_second) == (12, 5 * 12 / 3)  # three batches of a second each


def test_a_point_is_drawn_once_for_a_judge(tmp_path, monkeypatch):
    pytest.importorskip("mauve")
    drawn = []

    def noted(*arguments):
        drawn.append(arguments[-1])
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw_autoregressively(*arguments)

    monkeypatch.setattr(comparison.frontier, "draw_autoregressively", noted)
    preset, tokenizer = replace(PRESETS["smoke"], temperatures=(0.5, 0.8, 1.0)), train_tokenizer([TEXT], 300)
    judges = [save_byte_judge(tmp_path / folder / "judge", uniform) for folder, uniform in (("a", False), ("b", True))]

    def points(judge, load=lambda: AutoregressiveScorer(make_baseline(len(tokenizer)))):
        frontier = Frontier(tmp_path / "parts", preset, tokenizer, judge, TEXT, "cpu")
        return frontier.references(), list(frontier.points("autoregressive", 0, load))

    with pytest.raises(KeyboardInterrupt):
        points(judges[0])
    first = points(judges[0])
    assert drawn == [0.5, 0.8, 0.8, 1.0]
    assert points(judges[0], load=lambda: pytest.fail("loaded again")) == first
    _, second = points(judges[1])
    assert drawn[4:] == [0.5, 0.8, 1.0]
    assert [point["quality"]["generative_perplexity"] for point in second] == pytest.approx([256] * 3)
    assert points(judges[0]) == first
    written = [json.loads(path.read_text()) for path in tmp_path.glob("parts/*/autoregressive-at-*-seed-0.json")]
    assert sorted(map(str, written)) == sorted(map(str, first[1] + second))
    assert {point["judge"] for point in first[1]}.isdisjoint(point["judge"] for point in second)
