"""`hf-diffusion train`: every field of `TrainingSettings` as a flag."""

import argparse
import types
import typing
from dataclasses import MISSING, fields

from ..training.run import TrainingSettings, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    types_of = typing.get_type_hints(TrainingSettings)
    for field in fields(TrainingSettings):
        flag = "--" + field.name.replace("_", "-")
        kind, help_text = types_of[field.name], field.metadata["help"]
        if isinstance(kind, types.UnionType):
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
        if field.default is MISSING:
            parser.add_argument(flag, type=kind, required=True, help=help_text)
            continue
        help_text += f" (default: {field.default})"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=help_text)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(flag, type=typing.get_args(kind)[0], nargs="+", default=field.default, help=help_text)
        else:
            parser.add_argument(flag, type=kind, default=field.default, help=help_text)


def run(arguments: argparse.Namespace) -> None:
    values = {field.name: getattr(arguments, field.name) for field in fields(TrainingSettings)}
    # argparse collects several values in a list.
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    results = train(TrainingSettings(**values))
    for name, loss in results["validation_loss_nats_per_token"].items():
        print(f"validation loss, {name.replace('_', ' ')}: {loss:.3f} nats per token")
    print(f"written to {arguments.output}")
