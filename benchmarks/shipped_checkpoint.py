"""The checkpoint that comes with the package, as in its model card: likelihoods of held-out text and drawn texts.

    python benchmarks/shipped_checkpoint.py TEXT [--judge NAME] [--json shipped.json]

TEXT is the file that it was trained on (see the model card); the last tenth of it was held out. Likelihoods are exact
in the order named: left to right, and strided with 2, 4 and 8 streams. With a judge, texts are drawn at several
temperatures and compared with pieces of the held-out text.
"""

import argparse
import time
from pathlib import Path

from harness import report
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.evaluation import Judge, draw_texts, evaluate_text, judge_drawn, measure_samples, reference_pieces
from hf_diffusion.training.data import load_text
from hf_diffusion.training.run import split_text


STREAMS = (1, 2, 4, 8)
TEMPERATURES = (0.7, 0.85, 1.0)
LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--judge", help="folder or Hub name of a causal language model")
    parser.add_argument("--num-texts", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer, model = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE), AutoModel.from_pretrained(ARMD_SHAKESPEARE)
    _, (held_out,) = split_text(load_text(arguments.text), 0.1)
    rows = []
    for num_streams in STREAMS:
        scored = evaluate_text(model, tokenizer, held_out, strategy="strided", num_streams=num_streams)
        figures = {name: figure["value"] for name, figure in scored.figures().items()}
        rows.append([num_streams, f"{figures['nats_per_token']:.3f}", *list(figures.values())[1:]])
    columns = ["streams", "nats per token", "perplexity", "per word", "bits per byte"]
    report(f"{scored.num_tokens} held-out tokens", columns, rows, arguments.json)
    if arguments.judge is None:
        return
    judge = Judge(
        AutoModelForCausalLM.from_pretrained(arguments.judge).eval(), AutoTokenizer.from_pretrained(arguments.judge)
    )
    references = reference_pieces(tokenizer, held_out, LENGTH, arguments.num_texts)
    ids = [tokenizer(piece)["input_ids"] for piece in references]
    written, judged = measure_samples(ids, references, judge), judge.read(references)
    perplexity, entropy = written.generative_perplexity, f"{written.unigram_entropy:.3f}"
    rows = [["held-out text", "", perplexity, entropy, f"{written.distinct[2]:.3f}", "", ""]]
    for num_streams in STREAMS:
        for temperature in TEMPERATURES:
            settings = {"strategy": "strided", "num_streams": num_streams, "temperature": temperature}
            drawn = draw_texts(model, arguments.num_texts, LENGTH, clock=time.process_time, **settings)
            point = judge_drawn(str(num_streams), temperature, drawn, tokenizer, judge, judged)
            quality = point.quality
            row = [num_streams, temperature, quality.generative_perplexity, f"{quality.unigram_entropy:.3f}"]
            rows.append([*row, f"{quality.distinct[2]:.3f}", f"{quality.mauve:.3f}", point.nfe])
    columns = ["streams", "temperature", "generative perplexity", "entropy", "distinct 2-grams", "MAUVE", "passes"]
    report(f"{arguments.num_texts} texts of {LENGTH} tokens", columns, rows, arguments.json)


if __name__ == "__main__":
    main()
