"""Text that a causal model writes in parallel streams, before judges; and what might mend where streams begin.

    python benchmarks/stream_samples.py MODEL TEXT [--adapter FOLDER] [--judge MODEL ...] [--num-texts 16]

Texts go on from prompts out of TEXT, at temperature 1 from a nucleus of 0.95, in these ways:

- written: as `generate` does it;
- revised M: the first M tokens of every later stream drawn anew once everything else is there;
- best of K: K drafts of the first 8 tokens of every stream; each stream keeps the draft whose tokens 2 to 8 the model
  finds most likely after the first one, and goes on from it.

A judge is any causal model, by folder or Hub name, with any tokenizer; MODEL itself, from left to right, is the first
one, and is not independent. Judges' nats are divided by MODEL's tokens, so that judges compare. They say little without
the entropy of a text's tokens: dull text is likely.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from causal_lm import first_windows, mean_and_error
from harness import report
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_diffusion.conversion import from_causal_lm
from hf_diffusion.evaluation import Judge
from hf_diffusion.evaluation.samples import unigram_entropy


SEAM = 4  # tokens of a later stream that are judged apart
DRAFT = 8


class Writer:
    """Each way to write gives texts, long [batch, length of prompt and text], and the passes over the model they take.

    Args:
        prompts: long [batch, prompt length].
        length: number of new tokens, a multiple of all numbers of streams.
        shared: arguments of `generate`.
    """

    def __init__(self, model: Any, prompts: torch.Tensor, length: int, **shared: Any) -> None:
        self.model, self.prompts, self.length = model, prompts, length
        self.shared = {"strategy": "strided", "eos_token_id": None, **shared}

    def starts(self, num_streams: int) -> torch.Tensor:
        """Positions [streams - 1, 1] at which the later streams begin."""
        return self.prompts.shape[1] + (self.length // num_streams * torch.arange(1, num_streams))[:, None]

    def write(self, num_streams: int, seed: int = 0) -> tuple[torch.Tensor, int]:
        return self._generate(self.prompts, num_streams, seed, max_new_tokens=self.length)

    def revise(self, texts: torch.Tensor, num_streams: int, size: int) -> tuple[torch.Tensor, int]:
        """The passes are those of the revision alone."""
        return self._fill(texts, self.starts(num_streams) + torch.arange(size), num_streams - 1)

    def best_of(self, count: int, num_streams: int) -> tuple[torch.Tensor, int]:
        """The first tokens of a stream hang on nothing that comes after them, so whole texts will do as drafts."""
        start = self.prompts.shape[1]
        drafts = torch.stack([self.write(num_streams, seed)[0] for seed in range(count)])
        labels = drafts.clone()
        labels[..., :start] = -100
        scores = [
            self.model.score(text, labels=label, strategy="strided", num_streams=num_streams)
            for text, label in zip(drafts.flatten(0, 1).split(1), labels.flatten(0, 1).split(1), strict=True)
        ]
        likely = torch.cat([score.token_log_likelihood for score in scores]).view_as(drafts)
        streams, likely = (each[..., start:].unflatten(-1, (num_streams, -1)) for each in (drafts, likely))
        best = likely[..., 1:DRAFT].sum(dim=-1).argmax(dim=0)  # [batch, streams]
        chosen = streams.gather(0, best[None, ..., None].expand_as(streams[:1]))[0]
        begins = torch.cat([torch.tensor([[start]]), self.starts(num_streams)])
        rest = begins + torch.arange(DRAFT, self.length // num_streams)
        texts, passes = self._fill(torch.cat([self.prompts, chosen.flatten(1)], dim=1), rest, num_streams)
        return texts, count * (num_streams + DRAFT - 1) + passes

    def _fill(self, texts: torch.Tensor, places: torch.Tensor, num_streams: int) -> tuple[torch.Tensor, int]:
        """`texts` with the tokens at `places` (any shape) drawn anew."""
        masked = texts.index_fill(1, places.flatten(), self.model.config.mask_token_id)
        return self._generate(masked, num_streams, seed=1)

    def _generate(self, texts: torch.Tensor, num_streams: int, seed: int, **settings: Any) -> tuple[torch.Tensor, int]:
        outputs = self.model.generate(
            input_ids=texts,
            attention_mask=torch.ones_like(texts),
            num_streams=num_streams,
            seed=seed,
            return_dict_in_generate=True,
            **self.shared,
            **settings,
        )
        return outputs.sequences, outputs.nfe


def nats_up_to(judge: Judge, tokenizer: Any, texts: torch.Tensor, end: int) -> torch.Tensor:
    """Nats [batch] of the first `end` tokens of `texts` [batch, length], the first one left out."""
    return judge.read(tokenizer.batch_decode(texts[:, :end], skip_special_tokens=True)).nats


def judged(judge: Judge, tokenizer: Any, texts: torch.Tensor, start: int, seams: torch.Tensor) -> tuple[str, str]:
    """Nats per token from position `start` on, and of `SEAM` tokens from each of the positions `seams`."""
    whole = nats_up_to(judge, tokenizer, texts, texts.shape[1]) - nats_up_to(judge, tokenizer, texts, start)
    at_seams = [
        nats_up_to(judge, tokenizer, texts, seam + SEAM) - nats_up_to(judge, tokenizer, texts, seam)
        for seam in seams.flatten().tolist()
    ]
    rows = torch.stack(at_seams, dim=1) / SEAM if at_seams else None
    whole = whole[:, None] / (texts.shape[1] - start)
    return mean_and_error(whole), "" if rows is None else mean_and_error(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--judge", nargs="*", default=[], help="folders or Hub names, besides MODEL")
    parser.add_argument("--start-token", type=int, default=0)
    parser.add_argument("--num-texts", type=int, default=16)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--num-streams", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--revise", type=int, nargs="*", default=[4, 16], help="tokens of a stream")
    parser.add_argument("--best-of", type=int, nargs="*", default=[4])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--show", action="store_true", help="print the first text of each kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    length = arguments.new_tokens
    if any(length % count for count in arguments.num_streams):
        parser.error(f"--new-tokens {length} must be a multiple of each of --num-streams {arguments.num_streams}")
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    judges = []
    for name in (arguments.model, *arguments.judge):
        judge = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        judges.append(Judge(judge, AutoTokenizer.from_pretrained(name)))
    model: Any = from_causal_lm(arguments.model, gap_token_id=arguments.start_token, dtype=torch.float32).eval()
    if arguments.adapter is not None:
        model = PeftModel.from_pretrained(model, arguments.adapter).eval()
    windows = first_windows(
        tokenizer, arguments.text, arguments.num_texts, arguments.prompt_length + length, arguments.start_token
    )
    prompts = windows[:, : arguments.prompt_length + 1]
    # The texts have a fixed length, so an end is never drawn.
    writer = Writer(model, prompts, length, top_p=arguments.top_p, suppress_tokens=tokenizer.all_special_ids)
    start = prompts.shape[1]
    rows: list[list[Any]] = []

    def add(name: str, num_streams: int, passes: int | None, texts: torch.Tensor) -> None:
        results = [judged(judge, tokenizer, texts, start, writer.starts(num_streams)) for judge in judges]
        entropy = sum(map(unigram_entropy, texts[:, start:].tolist())) / len(texts)
        rows.append([name, num_streams, passes, *(cell for result in results for cell in result), entropy])
        print(rows[-1], flush=True)
        if arguments.show:
            print(tokenizer.decode(texts[0, start:]), "\n", flush=True)

    add("the text itself", max(arguments.num_streams), None, windows)
    for num_streams in arguments.num_streams:
        texts, passes = writer.write(num_streams)
        add("written", num_streams, passes, texts)
        if num_streams > 1:
            for size in arguments.revise:
                revised, more = writer.revise(texts, num_streams, size)
                add(f"revised {size}", num_streams, passes + more, revised)
            for count in arguments.best_of:
                best, passes_of_best = writer.best_of(count, num_streams)
                add(f"best of {count}", num_streams, passes_of_best, best)
    columns = ["texts", "S", "passes"]
    for name in (arguments.model, *arguments.judge):
        short = Path(name).name
        columns += [f"judge {short}", f"first {SEAM} of later streams"]
    title = f"{len(windows)} texts of {length} tokens after {arguments.prompt_length}, nats per token"
    report(title, [*columns, "entropy"], rows, arguments.json)


if __name__ == "__main__":
    main()
