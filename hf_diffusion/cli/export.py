"""`hf-diffusion export`: a folder, and a repository on the Hub, that loads where this package is not installed."""

import argparse
from pathlib import Path

from ..hub.export import export_model
from ..hub.upload import upload


CARD = ("license", "training_data")
PUSH = ("private", "revision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("output", type=Path, help="folder to write, which must not exist")
    card = parser.add_argument_group("for the model card, besides what training has left in the folder")
    card.add_argument("--license", help="of the weights, as the Hub calls it: apache-2.0, mit, ...")
    card.add_argument("--training-data", help="what the model was trained on, in words")
    push = parser.add_argument_group("upload")
    push.add_argument("--push", metavar="REPO", help="name on the Hub to upload the folder to")
    push.add_argument("--private", action="store_true", default=None, help="make the repository private, if it is new")
    push.add_argument("--revision", help="branch to commit to, made if it does not exist (default: main)")


def run(arguments: argparse.Namespace) -> None:
    for name in PUSH:
        if getattr(arguments, name) is not None and arguments.push is None:
            raise ValueError(f"`{name}` has no effect without `push`. Name a repository, or leave it out.")
    given = {name: getattr(arguments, name) for name in CARD if getattr(arguments, name) is not None}
    export_model(arguments.model, arguments.output, name=arguments.push, **given)
    print(f"written to {arguments.output}")
    if arguments.push is not None:
        try:
            address = upload(arguments.output, arguments.push, private=arguments.private, revision=arguments.revision)
        except OSError as error:
            raise OSError(
                f"{error} The folder is complete: `hf upload {arguments.push} {arguments.output}` sends it later."
            ) from error
        print(f"uploaded to {address}")
