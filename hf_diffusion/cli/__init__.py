"""The `hf-diffusion` command. One file per subcommand, each with `add_arguments(parser)` and `run(arguments)`."""

import argparse
import importlib
import sys
from collections.abc import Sequence


COMMANDS = {
    "demo": "watch the model that comes with the package write in parallel streams",
    "generate": "text from a model, by any strategy",
    "train": "train a model on text",
    "evaluate": "the likelihood of a text, or tasks of lm-eval",
    "frontier": "how good drawn texts are, by temperature and number of passes",
    "convert": "turn a checkpoint of another implementation into a folder that from_pretrained loads",
    "export": "write a model with the code that it needs where this package is not installed, and upload it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status; errors of the user are printed without a traceback."""
    parser = argparse.ArgumentParser(prog="hf-diffusion", description="Masked-diffusion language models.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Commands import the library, which takes seconds: only the one that is called.
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name in arguments[:1]:
            command = importlib.import_module(f".{name}", __package__)
            command.add_arguments(subparser)
    parsed = parser.parse_args(arguments)
    try:
        return command.run(parsed) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-diffusion {parsed.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


__all__ = ["main"]
