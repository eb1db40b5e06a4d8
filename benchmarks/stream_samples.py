"""Text that a causal model has written in parallel streams, before a judge: and with its seams written over again.

    python benchmarks/stream_samples.py MODEL TEXT [--adapter FOLDER] [--judge MODEL] [--num-texts 8]

Texts go on from prompts out of TEXT, at temperature 1. The judge is another causal model with the same tokenizer, where
you have one; by default it is MODEL itself, from left to right, which is not independent. Nats per token of the judge,
of all new tokens and of the first four of every later stream, say little without the entropy of the tokens of a text:
dull text is likely. "revised" draws those four anew when everything else is there, in 2 + S passes more.
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


SEAM = 4


def write(model: Any, prompts: torch.Tensor, num_tokens: int, num_streams: int) -> torch.Tensor:
    settings = {"strategy": "strided", "num_streams": num_streams, "max_new_tokens": num_tokens}
    real = torch.ones_like(prompts)
    return model.generate(input_ids=prompts, attention_mask=real, eos_token_id=None, seed=0, **settings)


def revise(model: Any, texts: torch.Tensor, seams: torch.Tensor) -> torch.Tensor:
    """`texts` [batch, length] with the positions `seams` [streams, 4] drawn anew, in as many streams."""
    masked = texts.index_fill(1, seams.flatten(), model.config.mask_token_id)
    settings = {"strategy": "strided", "num_streams": len(seams)}
    real = torch.ones_like(masked)
    return model.generate(input_ids=masked, attention_mask=real, eos_token_id=None, seed=1, **settings)


@torch.no_grad()
def judged(judge: Any, texts: torch.Tensor) -> torch.Tensor:
    """Nats [batch, length - 1] of every token but the first."""
    log_probs = torch.cat([judge(text).logits[:, :-1].float().log_softmax(dim=-1) for text in texts.split(1)])
    return -log_probs.gather(-1, texts[:, 1:, None])[..., 0]


def entropy(texts: torch.Tensor) -> float:
    """Of the distribution of tokens in a text, in nats, the mean over texts."""
    shares = [text.unique(return_counts=True)[1] / len(text) for text in texts]
    return sum(float(torch.special.entr(share).sum()) for share in shares) / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--judge", help="folder or Hub name (default: MODEL)")
    parser.add_argument("--start-token", type=int, default=0)
    parser.add_argument("--num-texts", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--num-streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--show", action="store_true", help="print the first text of each kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    judge = AutoModelForCausalLM.from_pretrained(arguments.judge or arguments.model, dtype=torch.float32).eval()
    model: Any = from_causal_lm(arguments.model, gap_token_id=arguments.start_token, dtype=torch.float32).eval()
    if arguments.adapter is not None:
        model = PeftModel.from_pretrained(model, arguments.adapter).eval()
    length = arguments.prompt_length + arguments.new_tokens
    real_texts = first_windows(tokenizer, arguments.text, arguments.num_texts, length, arguments.start_token)
    prompts = real_texts[:, : arguments.prompt_length + 1]

    def seams_of(num_streams: int) -> torch.Tensor:
        starts = torch.arange(1, num_streams) * (arguments.new_tokens // num_streams)
        return prompts.shape[1] + starts[:, None] + torch.arange(SEAM)

    texts = {("the text itself", 4): real_texts}
    for num_streams in arguments.num_streams:
        texts["written", num_streams] = write(model, prompts, arguments.new_tokens, num_streams)
        if num_streams > 1:
            seams = seams_of(num_streams)
            texts["revised", num_streams] = revise(model, texts["written", num_streams], seams)
    rows = []
    for (name, num_streams), each in texts.items():
        nats, seams = judged(judge, each), seams_of(num_streams)
        new = each[:, prompts.shape[1] :]
        at_seams = mean_and_error(nats[:, seams.flatten() - 1]) if num_streams > 1 else ""
        rows.append([name, num_streams, mean_and_error(nats[:, prompts.shape[1] - 1 :]), at_seams, entropy(new)])
        print(rows[-1], flush=True)
        if arguments.show:
            print(tokenizer.decode(new[0]), "\n", flush=True)
    columns = ["texts", "S", "judge", "judge, first four of later streams", "entropy"]
    title = f"{len(prompts)} texts of {arguments.new_tokens} tokens after {arguments.prompt_length}"
    report(title, columns, rows, arguments.json)


if __name__ == "__main__":
    main()
