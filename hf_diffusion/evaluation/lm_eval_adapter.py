"""Models of this package in lm-eval, as `hf-diffusion`: likelihoods from `score`, texts from `generate`.

Importing this file registers the name. What lm-eval's own class for Hugging Face models does is left to it: tokenizers,
contexts and prefixes, rolling windows, chat templates, adapters (`peft=`).
"""

import zlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForMaskedLM
from transformers.generation import StoppingCriteria

from ..generation.configuration import DIFFUSION_FIELDS
from ..generation.mixin import DiffusionGenerationMixin
from .finished_parts import FinishedParts


class UntilStrings(StoppingCriteria):
    """Ends a text where what is new in it spells one of some strings.

    transformers' `stop_strings` also end it where a string begins in the prompt, which lm-eval's tasks do not expect.

    Args:
        strings: not empty.
        num_given: columns of the prompt.
    """

    def __init__(self, tokenizer: Any, strings: list[str], num_given: int) -> None:
        self.tokenizer, self.strings, self.num_given = tokenizer, strings, num_given
        self.most_tokens = max(len(string.encode()) for string in strings) + 1  # the last one may spell more

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.num_given :][:, -self.most_tokens :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=False)
        ends = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(ends, device=input_ids.device)


@register_model("hf-diffusion")
class DiffusionLM(HFLM):
    """
    Args:
        pretrained: folder, Hub name, or a model.
        num_draws, estimator: of `model.score`.
        seed: of everything that is drawn. A likelihood has the same draws whatever it is batched with; texts that are
            generated have consecutive seeds.
        counts_file: keeps what is counted of every batch (passes, texts, ...), for a run that goes on from lm-eval's
            cache of its requests (`use_cache`). Delete it with that cache.
        kwargs: fields of the strategies, for `score` and for `generate` (a request's own generation arguments come
            first); and whatever lm-eval's `hf` takes, `peft` among it.

    Raises:
        ValueError: for a model that is none of this package's, and a context that its texts do not fit into.
    """

    def __init__(
        self,
        pretrained: Any,
        num_draws: int | None = None,
        estimator: str | None = None,
        seed: int = 0,
        counts_file: Path | None = None,
        **kwargs: Any,
    ) -> None:
        self.strategy_settings = {name: kwargs.pop(name) for name in DIFFUSION_FIELDS if name in kwargs}
        self.score_settings = {"num_draws": num_draws, "estimator": estimator, **self.strategy_settings}
        self.seed = seed
        self.likelihoods: dict[str, Any] = {}
        self.generations: dict[str, Any] = {"nfe": 0, "num_texts": 0, "tokens_per_forward": 0.0}
        self.batches = FinishedParts(counts_file, {})
        for batch in self.batches.parts.values():
            self._add(**batch)
        super().__init__(pretrained=pretrained, **kwargs)
        get_base_model = getattr(self.model, "get_base_model", None)  # of an adapter, whose layers are in the model
        self.diffusion_model: Any = self.model if get_base_model is None else get_base_model()
        if not isinstance(self.diffusion_model, DiffusionGenerationMixin):
            raise ValueError(
                f"`pretrained`={pretrained!r} is a {type(self.diffusion_model).__name__}, no masked-diffusion model. "
                "Take lm-eval's own `hf`."
            )
        if self._max_length is not None and self._max_length >= self._context:
            raise ValueError(
                f"`max_length` ({self._max_length}) must be less than the model's context ({self._context}): lm-eval "
                "does not count the last token of a text."
            )

    def _get_backend(self, *args: Any, **kwargs: Any) -> None:
        self.backend = "causal"  # contexts are read together with what follows
        self.AUTO_MODEL_CLASS = AutoModelForMaskedLM

    @property
    def _context(self) -> int:
        return self.diffusion_model.config.max_position_embeddings

    @property
    def max_length(self) -> int:
        """Tokens that are read to predict the last one, which has a place in the context here."""
        return self._max_length or self._context - 1

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether each is what greedy generation draws.

        Args:
            requests: of ((context, continuation), token ids of the context, token ids of the continuation).
        """
        # Texts of about one length together, the longest first: what needs most memory fails at once.
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1]) - len(requests[n][2]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        batch_size = override_bs or int(self.batch_size)
        for start in tqdm(range(0, len(order), batch_size), disable=disable_tqdm or self.rank != 0):
            numbers = order[start : start + batch_size]
            scored = self._score([requests[number] for number in numbers], greedy=override_bs is None)
            for number, result in zip(numbers, scored, strict=True):
                results[number] = result
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
        return results

    def _score(self, requests: list[Any], greedy: bool) -> list[tuple[float, bool]]:
        texts = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        num_scored = [min(len(request[2]), len(text)) for request, text in zip(requests, texts, strict=True)]
        width = max(map(len, texts))
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (text, count) in enumerate(zip(texts, num_scored, strict=True)):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
            labels[row, len(text) - count : len(text)] = torch.tensor(text[len(text) - count :])
        seeds = [
            self.seed + zlib.crc32(str((text, count)).encode()) for text, count in zip(texts, num_scored, strict=True)
        ]
        scored = self.diffusion_model.score(ids, mask, labels, seed=seeds, **self.score_settings)
        self._note(scored)
        is_greedy = scored.is_greedy
        if is_greedy is None and greedy:
            is_greedy = self._is_drawn_greedily(ids, mask, labels, seeds)
        likelihoods = scored.log_likelihood.tolist()
        return list(zip(likelihoods, [False] * len(texts) if is_greedy is None else is_greedy.tolist(), strict=True))

    def _is_drawn_greedily(
        self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, seeds: list[int]
    ) -> torch.Tensor:
        """Bool [batch], by drawing in the orders that the seeds give."""
        model = self.diffusion_model
        canvas = ids.masked_fill(labels != -100, model.config.mask_token_id).to(model.device)
        drawn = model.generate(
            canvas,
            attention_mask=mask.to(model.device),
            do_sample=False,
            seed=seeds,
            eos_token_id=None,
            **self.strategy_settings,
        )
        return ((drawn.cpu() == labels) | (labels == -100)).all(dim=1)

    def _note(self, scored: Any) -> None:
        said = {"estimator": scored.estimator, "is_exact": scored.is_exact, "sampler": scored.sampler}
        if scored.standard_error is not None:
            largest = self.likelihoods.get("largest_standard_error", 0.0)
            said["largest_standard_error"] = max(largest, float(scored.standard_error.max()))
        num_tokens = int(scored.num_tokens.sum())
        counts = {"nfe": scored.nfe, "num_texts": len(scored.num_tokens), "num_tokens": num_tokens}
        self._count("likelihoods", counts, said)

    def _count(self, of: str, counts: dict[str, Any], said: dict[str, Any]) -> None:
        batch: dict[str, Any] = {"of": of, "counts": counts, "said": said}
        self._add(**batch)
        self.batches.add(len(self.batches.parts), batch)

    def _add(self, of: str, counts: dict[str, Any], said: dict[str, Any]) -> None:
        """Counts of a batch add up; what was said of the last one holds for all."""
        noted = self.likelihoods if of == "likelihoods" else self.generations
        for name, count in counts.items():
            noted[name] = noted.get(name, 0) + count
        noted.update(said)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        """Texts [batch, length] with the context in front. For `generation_kwargs` see `generate`."""
        settings = {**self.strategy_settings, **generation_kwargs}
        if "strategy" in generation_kwargs:
            settings = generation_kwargs
        if not settings.get("do_sample"):
            settings = {name: value for name, value in settings.items() if name != "temperature"}
        end = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        stop_strings = [string for string in stop if string and string != end]
        model = self.diffusion_model
        output: Any = model.generate(
            context,
            max_new_tokens=max_length - context.shape[1],
            stopping_criteria=[UntilStrings(self.tokenizer, stop_strings, context.shape[1])] if stop_strings else None,
            eos_token_id=self.eot_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            seed=self.seed + int(self.generations["num_texts"]),
            return_dict_in_generate=True,
            **settings,
        )
        tokens_per_forward = float(output.tokens_per_forward.sum())
        counts = {"nfe": output.nfe, "num_texts": len(context), "tokens_per_forward": tokens_per_forward}
        if settings.get("do_sample"):  # lm-eval draws these again
            self._add("generations", counts, {})
        else:
            self._count("generations", counts, {})
        return output.sequences

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval puts this into the "config" of its results."""
        noted = dict(self.generations)
        if noted["num_texts"]:
            noted["tokens_per_forward"] /= noted["num_texts"]
        return {
            **super().get_model_info(),
            "likelihood": self.likelihoods or None,
            "generation": {**noted, **self.strategy_settings} if noted["num_texts"] else None,
            "seed": self.seed,
        }


__all__ = ["DiffusionLM"]
