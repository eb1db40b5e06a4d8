"""Held-out losses of the checkpoint that comes with the package, as in its model card.

    python benchmarks/shipped_checkpoint.py TEXT [--json shipped.json]

TEXT is the file that it was trained on (see the model card); the last tenth of it was held out. Nats per token, exact
in the order named: left to right, and strided with 2, 4 and 8 streams.
"""

import argparse
from pathlib import Path

import torch
from harness import report
from transformers import AutoModel, AutoTokenizer

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.diffusion.orders import strided_steps
from hf_diffusion.training.data import TokenTexts, load_text, tokenize
from hf_diffusion.training.run import split_text


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer, model = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE), AutoModel.from_pretrained(ARMD_SHAKESPEARE)
    _, held_out = split_text(load_text(arguments.text), 0.1)
    length = model.config.max_position_embeddings
    texts = TokenTexts(tokenize(held_out, tokenizer), length).texts
    rows = []
    for num_streams in (1, 2, 4, 8):
        block_index = strided_steps(length, num_streams)
        losses = [
            model(batch, block_index=block_index.expand_as(batch), labels=batch).loss * len(batch)
            for batch in texts.split(8)
        ]
        rows.append([num_streams, f"{float(sum(losses)) / len(texts):.3f}"])
    report(f"{texts.numel()} held-out tokens", ["streams", "nats per token"], rows, arguments.json)


if __name__ == "__main__":
    main()
