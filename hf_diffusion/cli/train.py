"""`hf-diffusion train`: every field of a family's `TrainingRecipe` as a flag."""

import argparse
import types
import typing
from dataclasses import MISSING, Field, fields
from typing import Any

from ..training.families import FAMILIES
from ..training.run import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    summaries = "; ".join(f"{family}: {recipe.summary}" for family, recipe in FAMILIES.items())
    parser.add_argument("--family", help=f"{summaries} (default: armd; causal_streams with --from-causal-lm)")
    groups: dict[tuple[str, ...], Any] = {tuple(FAMILIES): parser}
    for name, families in _families_of_flags().items():
        if families not in groups:
            groups[families] = parser.add_argument_group(f"with --family {' or '.join(families)} only")
        own = {family: _fields(family)[name] for family in families}
        kind = typing.get_type_hints(FAMILIES[families[0]])[name]
        _add_flag(groups[families], own, kind, required_of_all=families == tuple(FAMILIES))


def _families_of_flags() -> dict[str, tuple[str, ...]]:
    """The families that read each flag."""
    families: dict[str, tuple[str, ...]] = {}
    for family in FAMILIES:
        for name in _fields(family):
            families[name] = (*families.get(name, ()), family)
    return families


def _fields(family: str) -> dict[str, Field]:
    return {field.name: field for field in fields(FAMILIES[family])}


def _add_flag(parser: Any, fields_of_families: dict[str, Field], kind: Any, required_of_all: bool) -> None:
    """A flag for what may have another default in each family that has it."""
    field = next(iter(fields_of_families.values()))
    flag, help_text = "--" + field.name.replace("_", "-"), field.metadata["help"]
    if isinstance(kind, types.UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if field.default not in (MISSING, None):
        different = {family: own.default for family, own in fields_of_families.items() if own.default != field.default}
        defaults = [str(field.default), *(f"{family}: {default}" for family, default in different.items())]
        help_text += f" (default: {'; '.join(defaults)})"
    # What is not given stays out of the namespace, so that a flag that the family does not read can be told.
    options: dict[str, Any] = {
        "help": help_text,
        "default": argparse.SUPPRESS,
        "required": required_of_all and field.default is MISSING,
    }
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is tuple:
        options |= {"type": typing.get_args(kind)[0], "nargs": "+"}
    else:
        options["type"] = kind
    parser.add_argument(flag, **options)


def run(arguments: argparse.Namespace) -> None:
    family = arguments.family or ("causal_streams" if hasattr(arguments, "from_causal_lm") else "armd")
    if family not in FAMILIES:
        raise ValueError(f"`family` must be one of {', '.join(FAMILIES)}, got {family!r}.")
    families_of_flags = _families_of_flags()
    given = {name: value for name, value in vars(arguments).items() if name in families_of_flags}
    for name, value in given.items():
        if family not in families_of_flags[name]:
            raise ValueError(
                f"`{name}` ({value}) has no effect with `family`={family!r}; it is for "
                f"{' and '.join(families_of_flags[name])}. Leave it out."
            )
    for name, field in _fields(family).items():
        if field.default is MISSING and name not in given:
            raise ValueError(f"`{name}` is missing, and `family`={family!r} needs it: {field.metadata['help']}.")
    # argparse collects several values in a list.
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    results = train(FAMILIES[family](**given))
    errors = results["standard_error_nats_per_token"]
    for name, loss in results["validation_loss_nats_per_token"].items():
        error = f" ± {errors[name]:.3f}" if name in errors else ""
        print(f"validation loss, {name.replace('_', ' ')}: {loss:.3f}{error} nats per token")
    print(f"written to {arguments.output}")
