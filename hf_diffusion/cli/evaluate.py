"""`hf-diffusion evaluate`: the likelihood of a text per token, word and byte; or tasks of lm-eval."""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging

from ..checkpoints import ARMD_SHAKESPEARE
from ..evaluation.environment import environment
from ..evaluation.text_likelihood import evaluate_text, fingerprint
from ..generation.configuration import DIFFUSION_FIELDS
from ..generation.mixin import DiffusionGenerationMixin
from .devices import check_device
from .generate import SETTINGS


OF_TEXT = ("window", "stride")
OF_TASKS = ("include_path", "limit", "num_fewshot", "gen_kwargs")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load_model` reads."""
    parser.add_argument(
        "model", nargs="?", default=ARMD_SHAKESPEARE, help="folder or Hub name (default: the one in the package)"
    )
    parser.add_argument("--peft", help="folder or Hub name of an adapter")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are saved)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--text", type=Path, help="a file of plain text in UTF-8, scored as a whole")
    parser.add_argument("--tasks", nargs="+", help="tasks of lm-eval (pip install 'hf-diffusion[eval]')")
    parser.add_argument("--json", type=Path, help="write the results here; what is interrupted goes on from beside it")
    parser.add_argument("--batch-size", type=int, default=8, help="texts read together (default: 8)")
    parser.add_argument("--num-draws", type=int, help="draws of an estimated bound (default: 16)")
    parser.add_argument("--estimator", help="of a bound (default: the model's best)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    for name in DIFFUSION_FIELDS:
        if name in SETTINGS:
            kind, help_text = SETTINGS[name]
            parser.add_argument("--" + name.replace("_", "-"), type=kind, help=help_text)
    parser.add_argument("--learned-order", action=argparse.BooleanOptionalAction, help="see `generate`")
    group = parser.add_argument_group("with --text only")
    group.add_argument("--window", type=int, help="most tokens that are read together (default: the model's context)")
    group.add_argument("--stride", type=int, help="tokens scored in a window, the rest given (default: all)")
    group = parser.add_argument_group("with --tasks only")
    group.add_argument("--include-path", type=Path, help="folder of task files besides lm-eval's own")
    group.add_argument("--limit", type=int, help="examples of each task, to try things out")
    group.add_argument("--num-fewshot", type=int, help="examples in the context")
    group.add_argument("--gen-kwargs", help="of generation, as name=value,name=value")


def run(arguments: argparse.Namespace) -> None:
    logging.disable_progress_bar()
    if (arguments.text is None) == (arguments.tasks is None):
        raise ValueError("Pass either `text`, a file, or `tasks` of lm-eval.")
    source, without_effect = ("text", OF_TASKS) if arguments.tasks is None else ("tasks", OF_TEXT)
    for name in without_effect:
        if getattr(arguments, name) is not None:
            raise ValueError(f"`{name}`={getattr(arguments, name)!r} has no effect with `{source}`. Leave it out.")
    check_device(arguments.device)
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        raise ValueError(f"`json`={str(arguments.json)!r}: there is no such folder. Make it first.")
    if arguments.json is not None and arguments.json.is_dir():
        raise ValueError(f"`json`={str(arguments.json)!r} is a folder. Name a file in it.")
    names = (*(name for name in DIFFUSION_FIELDS if hasattr(arguments, name)), "num_draws", "estimator")
    settings = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    results, parts = (_evaluate_text if arguments.tasks is None else _evaluate_tasks)(arguments, settings)
    if arguments.json is not None:
        described = {
            "model": str(arguments.model),
            "peft": arguments.peft,
            "seed": arguments.seed,
            "device": arguments.device,
            "settings": settings,
            **results,
            "environment": environment(),
        }
        arguments.json.write_text(json.dumps(described, indent=2, default=str) + "\n", encoding="utf-8")
    for file in parts:
        file.unlink()


Evaluated = tuple[dict[str, Any], list[Path]]
"""The results, and files of finished parts, which are of no use once the results are written."""


def _evaluate_text(arguments: argparse.Namespace, settings: dict[str, Any]) -> Evaluated:
    try:
        text = arguments.text.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`text`={str(arguments.text)!r} is not UTF-8: {error}. Convert it.") from None
    model, tokenizer = load_model(arguments)
    parts_file = None if arguments.json is None else _beside(arguments.json, ".parts")
    result = evaluate_text(
        model,
        tokenizer,
        text,
        window=arguments.window,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        parts_file=parts_file,
        show_progress=True,
        **settings,
    )
    print(f"{'exact likelihood' if result.is_exact else 'bound'} of {result.sampler}, estimator {result.estimator}")
    for name, figure in result.figures().items():
        plus_minus = f" ± {figure['standard_error']:.4f}" if "standard_error" in figure else ""
        print(f"{name.replace('_', ' '):>16}: {figure['value']:.4f}{plus_minus}")
    print(f"{result.num_tokens} tokens, {result.num_words} words, {result.num_bytes} bytes, {result.nfe} passes")
    if result.num_unknown_tokens:
        print(f"{result.num_unknown_tokens} tokens stand for what the tokenizer cannot spell: not to be compared")
    described = {"text": str(arguments.text), "dtype": str(model.dtype), "figures": result.figures(), **asdict(result)}
    return described, [] if parts_file is None else [parts_file]


def _evaluate_tasks(arguments: argparse.Namespace, settings: dict[str, Any]) -> Evaluated:
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from ..evaluation.lm_eval_adapter import DiffusionLM
    except ImportError as error:
        raise ImportError(f"`tasks` needs lm-eval: pip install 'hf-diffusion[eval]'. ({error})") from None
    folder = None if arguments.include_path is None else str(arguments.include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(arguments.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # reads thousands of files
    model, tokenizer = load_model(arguments)
    cache, counts_file = None, None
    if arguments.json is not None:
        # lm-eval keys what it keeps by request alone.
        key = hashlib.sha256(json.dumps([fingerprint(model), settings, arguments.seed]).encode()).hexdigest()[:16]
        cache, counts_file = _beside(arguments.json, f".{key}"), _beside(arguments.json, f".{key}.counts")
    lm = DiffusionLM(
        model,
        tokenizer=tokenizer,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        counts_file=counts_file,
        **settings,
    )
    results = simple_evaluate(
        model=lm,
        tasks=arguments.tasks,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        gen_kwargs=arguments.gen_kwargs,
        task_manager=manager,
        use_cache=None if cache is None else str(cache),
        log_samples=False,
    )
    assert results is not None
    print(make_table(results))
    for name in ("likelihood", "generation"):
        if results["config"][name]:
            print(f"{name}: " + ", ".join(f"{key}={value}" for key, value in results["config"][name].items()))
    if cache is None or counts_file is None:
        return results, []
    return results, [counts_file, *cache.parent.glob(f"{cache.name}_rank*.db")]


def load_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A model in evaluation mode, where and as the arguments say, and its tokenizer."""
    dtype = "auto" if arguments.dtype is None else getattr(torch, arguments.dtype)
    model: Any = AutoModelForMaskedLM.from_pretrained(arguments.model, dtype=dtype)
    if not isinstance(model, DiffusionGenerationMixin):
        raise ValueError(f"`model`={str(arguments.model)!r} is a {type(model).__name__}, no masked-diffusion model.")
    if arguments.peft is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.peft).get_base_model()
    return model.eval().to(arguments.device), AutoTokenizer.from_pretrained(arguments.model)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)
