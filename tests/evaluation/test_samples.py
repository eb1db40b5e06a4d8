"""Measures of drawn texts against closed forms, and a judge against transformers' own loss."""

import math
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.evaluation import (
    Judge,
    SampleQuality,
    draw_texts,
    judge_drawn,
    measure_samples,
    plot_frontier,
)
from hf_diffusion.evaluation.samples import distinct_n_grams, mauve, unigram_entropy


SIZE = 26


class Letters:
    """A tokenizer of the lower-case letters, a token each."""

    def __call__(self, text, **arguments):
        assert arguments == {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(ord("a") + token % SIZE) for token in ids)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def armd():
    return FAMILIES["armd"].model_class.from_pretrained(ARMD_SHAKESPEARE)


def as_ids(text):
    return [ord(letter) - ord("a") for letter in text]


@pytest.mark.parametrize(
    ("tokens", "entropy"),
    [
        ([7], 0.0),
        ([7, 7, 7], 0.0),
        ([1, 2, 3, 4], math.log(4)),
        ([5, 5, 6, 9], 1.5 * math.log(2)),  # 1/2, 1/4, 1/4
    ],
)
def test_entropy_of_known_counts(tokens, entropy):
    assert unigram_entropy(tokens) == pytest.approx(entropy, abs=1e-12)


def test_distinct_n_grams_by_hand():
    texts = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct_n_grams(texts, 1) == pytest.approx(3 / 7)
    assert distinct_n_grams(texts, 2) == pytest.approx(3 / 5)  # 12 21 12 and 12 23
    assert distinct_n_grams(texts, 3) == pytest.approx(3 / 3)  # 121 212 and 123
    assert distinct_n_grams(texts, 4) == 1.0
    assert distinct_n_grams(texts, 5) is None


def test_a_uniform_judge_has_the_perplexity_of_its_vocabulary(llama):
    torch.nn.init.zeros_(llama.lm_head.weight)
    texts = ["banana", "ab", "thequickbrownfox"]
    quality = measure_samples([as_ids(text) for text in texts], texts, Judge(llama, Letters()))
    assert quality.generative_perplexity == pytest.approx(SIZE)
    assert quality.num_judged_tokens == 5 + 1 + 15
    assert quality.mauve is None


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_judge_is_transformers_loss_text_by_text(llama, batch_size):
    texts = ["banana", "ab", "thequickbrownfox", "c", "zz"]
    judged = Judge(llama, Letters(), batch_size).read(texts)
    for text, nats, num_tokens, features in zip(texts, judged.nats, judged.num_tokens, judged.features, strict=True):
        ids = torch.tensor([as_ids(text)])
        with torch.no_grad():
            alone = llama(ids, labels=ids, output_hidden_states=True)
        assert num_tokens == len(text) - 1
        if num_tokens:
            assert nats == pytest.approx(float(alone.loss) * (len(text) - 1), rel=1e-5)
        else:
            assert nats == 0
        torch.testing.assert_close(features, alone.hidden_states[-1][0, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_long_text_is_read_with_half_a_context_before_every_token(llama, batch_size):
    torch.manual_seed(1)
    texts = ["".join(chr(ord("a") + int(token)) for token in torch.randint(SIZE, (n,))) for n in (100, 40, 41, 7)]
    judged = Judge(llama, Letters(), batch_size).read(texts)
    for number, text in enumerate(texts):
        ids, nats = torch.tensor(as_ids(text)), 0.0
        for position in range(1, len(ids)):
            # The first window has 40 tokens; every further one scores 20, after as many that it is given or more.
            if position < 40:
                start = 0
            else:
                start = min(40 + (position - 40) // 20 * 20 + 20, len(ids)) - 40
            with torch.no_grad():
                nats -= float(llama(ids[None, start:position]).logits[0, -1].log_softmax(-1)[ids[position]])
        assert judged.nats[number] == pytest.approx(nats, rel=1e-5)
        with torch.no_grad():
            last = llama(ids[None, -40:], output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(judged.features[number], last, rtol=0, atol=1e-5)
    assert judged.num_tokens.tolist() == [99, 39, 40, 6]


def test_empty_texts_are_counted_and_change_nothing(llama):
    pytest.importorskip("mauve")
    judge, texts = Judge(llama, Letters(), 2), ["banana", "thequick", "zebra"]
    references = judge.read(["brownfox", "jumps", "over"])
    without = measure_samples([as_ids(text) for text in texts], texts, judge, references)
    more = ["", "banana", "thequick", "", "zebra"]
    among = measure_samples([as_ids(text) or [3] for text in more], more, judge, references)
    assert among == replace(without, num_texts=5, num_empty=2)
    nothing = measure_samples([[3], [3]], ["", ""], judge, references)
    assert (nothing.generative_perplexity, nothing.unigram_entropy, nothing.mauve) == (None, None, None)
    assert (nothing.num_texts, nothing.num_empty) == (2, 2)


def test_one_token_is_no_perplexity(llama):
    quality = measure_samples([[1], [2]], ["b", "c"], Judge(llama, Letters()))
    assert (quality.generative_perplexity, quality.num_judged_tokens, quality.unigram_entropy) == (None, 0, 0.0)


def test_one_word_over_and_over_is_seen_by_the_entropy(llama):
    """Why perplexity is never reported alone."""
    repeated, various = ["aaaaaaaa"], ["abcdefgh"]
    judge = Judge(llama, Letters())
    dull, lively = (measure_samples([as_ids(text[0])], text, judge) for text in (repeated, various))
    assert (dull.unigram_entropy, dull.distinct[1]) == (0.0, 1 / 8)
    assert (lively.unigram_entropy, lively.distinct[1]) == (pytest.approx(math.log(8)), 1.0)


def test_mauve_of_one_law_is_near_1_and_of_two_apart_near_0():
    pytest.importorskip("mauve")
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(200, 8, generator=generator)
    assert mauve(texts, texts) == pytest.approx(1, abs=1e-6)
    assert mauve(texts, torch.randn(200, 8, generator=generator)) > 0.8
    apart = torch.randn(200, 8, generator=generator)
    apart[:, 0] += 100  # features are scaled to length 1
    assert mauve(texts, apart) < 0.05


@pytest.mark.parametrize(
    ("token_ids", "texts", "message"),
    [
        ([], [], "`texts` is empty"),
        ([[1], [2]], ["a"], "`token_ids` has 2 texts and `texts` 1"),
    ],
)
def test_texts_that_cannot_be_judged_are_refused(llama, token_ids, texts, message):
    with pytest.raises(ValueError, match=message):
        measure_samples(token_ids, texts, Judge(llama, Letters()))


def test_a_judge_that_is_trained_is_refused(llama):
    with pytest.raises(ValueError, match="training mode"):
        Judge(llama.train(), Letters())
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        Judge(llama.eval(), Letters(), 0)


class TestDrawnTexts:
    @pytest.mark.parametrize(("num_streams", "passes"), [(1, 12), (4, 4 + 3 - 1)])
    def test_passes_and_texts_are_those_of_generate(self, armd, num_streams, passes):
        settings = {"strategy": "strided", "num_streams": num_streams, "eos_token_id": None}
        drawn = draw_texts(armd, 5, 12, seed=3, batch_size=2, **settings)
        assert drawn.nfe == passes
        assert drawn.tokens_per_second > 0
        nothing = torch.empty(5, 0, dtype=torch.long)
        at_once = armd.generate(nothing, max_new_tokens=12, seed=[3, 4, 5, 6, 7], **settings)
        assert drawn.token_ids == at_once.tolist()

    def test_what_follows_an_end_is_no_text(self, armd):
        drawn = draw_texts(armd, 8, 12, eos_token_id=list(range(0, 2048, 4)), pad_token_id=0)
        assert min(map(len, drawn.token_ids)) < 12
        for tokens in drawn.token_ids:
            assert all(token % 4 for token in tokens[:-1])
            assert tokens[-1] % 4 == 0 or len(tokens) == 12
        assert drawn.nfe == sum(map(len, drawn.token_ids)) / 8

    def test_a_frontier_is_drawn(self, armd, llama, tmp_path):
        points = []
        for temperature in (0.1, 1.0):
            drawn = draw_texts(armd, 4, 12, temperature=temperature, eos_token_id=None)
            points.append(judge_drawn("left to right", temperature, drawn, Letters(), Judge(llama, Letters())))
        assert isinstance(points[0].quality, SampleQuality)
        assert points[0].quality.unigram_entropy < points[1].quality.unigram_entropy
        plot_frontier(points, tmp_path / "frontier.svg")
        drawn = (tmp_path / "frontier.svg").read_text()
        # Perplexity never stands without entropy: over it, and both over passes.
        assert drawn.count("<!-- generative perplexity") == 2
        assert drawn.count("<!-- unigram entropy") == 2
        assert "left to right" in drawn
