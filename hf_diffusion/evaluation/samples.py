"""How good drawn texts are. No number here means much alone: a text of one word repeated has a low perplexity."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .judge import Judge, JudgedTexts


DISTINCT = (1, 2, 3)


@dataclass(frozen=True)
class SampleQuality:
    """
    Texts of which the judge has no token are counted, and left out of everything else: they have neither perplexity nor
    entropy. What the rest is too short for is None.

    Attributes:
        generative_perplexity: exp of the judge's mean negative log-likelihood per token, over the tokens of all texts;
            in the judge's tokens, the first of every text left out.
        num_judged_tokens: how many these are.
        unigram_entropy: mean over texts of the entropy of a text's own token counts, in nats; log(length) at most.
        distinct: by n, the share of different n-grams among all n-grams of all texts.
        mauve: between the texts and others (arXiv 2102.01454), in the judge's features: from 0 to 1, the same law. None
            without other texts. It is found from a cluster for every ten texts, so it is coarse where there are few;
            it depends on their number too, so compare it at equal numbers only.
        num_texts: of the drawn ones.
        num_empty: how many of them are empty.
    """

    generative_perplexity: float | None
    num_judged_tokens: int
    unigram_entropy: float | None
    distinct: dict[int, float | None]
    mauve: float | None
    num_texts: int
    num_empty: int


def measure_samples(
    token_ids: Sequence[Sequence[int]],
    texts: Sequence[str],
    judge: Judge,
    references: JudgedTexts | None = None,
) -> SampleQuality:
    """
    Args:
        token_ids: the tokens of every text, up to its end and without padding.
        texts: the same as the judge reads them.
        judge: gives perplexity and features.
        references: what the same judge has read of texts that people wrote, of about the same length; as many as there
            are texts, best of all.

    Raises:
        ValueError: for no texts, or not as many as there are `token_ids`.
    """
    if len(token_ids) != len(texts):
        raise ValueError(f"`token_ids` has {len(token_ids)} texts and `texts` {len(texts)}: they must be the same.")
    judged = judge.read(texts)
    num_judged = int(judged.num_tokens.sum())
    kept = [tokens for tokens, is_empty in zip(token_ids, judged.is_empty, strict=True) if not is_empty]
    return SampleQuality(
        generative_perplexity=math.exp(float(judged.nats.sum()) / num_judged) if num_judged else None,
        num_judged_tokens=num_judged,
        unigram_entropy=sum(map(unigram_entropy, kept)) / len(kept) if kept else None,
        distinct={n: distinct_n_grams(kept, n) for n in DISTINCT},
        mauve=mauve(judged.features, references.features) if kept and references is not None else None,
        num_texts=len(texts),
        num_empty=len(texts) - len(kept),
    )


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Entropy in nats of the counts of a text's tokens."""
    if not tokens:
        raise ValueError("`tokens` is empty: it has no entropy.")
    counts = torch.tensor(list(Counter(tokens).values()), dtype=torch.float64)
    return float(torch.special.entr(counts / counts.sum()).sum())


def distinct_n_grams(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams divided by all n-grams, those of all texts together; None if no text has any."""
    grams = [tuple(text[start : start + n]) for text in texts for start in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def check_mauve() -> None:
    """Raise ImportError where the library of MAUVE's authors is not installed, before there is anything to measure."""
    try:
        import mauve  # noqa: F401
    except ImportError as error:
        raise ImportError(f"MAUVE needs its authors' library: pip install 'hf-diffusion[mauve]'. ({error})") from None


def mauve(features: torch.Tensor, other_features: torch.Tensor) -> float:
    """MAUVE by its authors' library, with its defaults.

    Args:
        features, other_features: float [texts, size], of drawn and of other texts.
    """
    check_mauve()
    from mauve import compute_mauve

    result: Any = compute_mauve(p_features=features.numpy(), q_features=other_features.numpy(), verbose=False)
    return float(result.mauve)


__all__ = ["SampleQuality", "check_mauve", "distinct_n_grams", "mauve", "measure_samples", "unigram_entropy"]
