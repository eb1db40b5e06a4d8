"""Training a model from text, end to end: tokenizer, model, data, averaged weights, evaluation, files."""

import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import PreTrainedModel, TrainingArguments

from .curves import LossCurveCallback
from .data import TokenTexts, load_text, tokenize
from .diagnostics import DiagnosticTrainer
from .ema import EMACallback, last_complete_checkpoint, remove_incomplete_checkpoints
from .recipe import TrainingRecipe


def train(recipe: TrainingRecipe) -> dict[str, Any]:
    """Train a model, write it with everything that belongs to it into `recipe.output`, and return its results.

    Losses are in nats per token, of the averaged weights on the whole validation text; what they are called says what
    they are (see the family's `evaluations`). Those that are estimated by drawing come with a standard error: how far
    other draws on the same text would have been from these. `estimators` says how each is found, and `nfe` from
    how many network evaluations for each text: one per draw.
    """
    if not recipe.resume and last_complete_checkpoint(recipe.output / "checkpoints") is not None:
        raise ValueError(
            f"`output`={str(recipe.output)!r} holds checkpoints of another run. Continue it with `resume`, or name "
            "another folder."
        )
    _check_continued(recipe)
    training_text, validation_text = _load_texts(recipe)
    tokenizer = recipe.build_tokenizer(training_text)
    tokens, validation_tokens = tokenize(training_text, tokenizer), tokenize(validation_text, tokenizer)
    data = TokenTexts(tokens, recipe.text_length)
    evaluations = recipe.evaluations(validation_tokens, tokenizer)
    first_tokens = validation_tokens[: recipe.validation_texts * recipe.text_length]
    while_training: dict[str, Any] = {
        name: ConcatDataset(draws) for name, draws in recipe.evaluations(first_tokens, tokenizer).items()
    }

    arguments = _arguments(recipe)
    torch.manual_seed(recipe.seed)
    model = recipe.build_model(tokenizer)
    ema = EMACallback(recipe.ema_decay)
    collator = recipe.collator(tokenizer)
    trainer = DiagnosticTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=_whole_batches(data, recipe.batch_size * arguments.world_size),
        eval_dataset=while_training,
        callbacks=[ema, *recipe.callbacks(collator), LossCurveCallback(recipe.phases())],
    )
    if trainer.is_world_process_zero():
        remove_incomplete_checkpoints(recipe.output / "checkpoints")
        _settings_file(recipe).parent.mkdir(parents=True, exist_ok=True)
        _settings_file(recipe).write_text(json.dumps(_settings(recipe), indent=2) + "\n")
    checkpoint = _last_checkpoint(recipe) if recipe.resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    with ema.applied(model):
        weights = trainer.accelerator.get_state_dict(model)  # put together, where they are sharded
        if trainer.is_world_process_zero():
            _save(model, weights, tokenizer, recipe)
        losses = {
            name: [trainer.evaluate(draw, metric_key_prefix="final")["final_loss"] for draw in draws]
            for name, draws in evaluations.items()
        }
    results = {
        "validation_loss_nats_per_token": {name: statistics.fmean(draws) for name, draws in losses.items()},
        "standard_error_nats_per_token": {
            name: statistics.stdev(draws) / math.sqrt(len(draws)) for name, draws in losses.items() if len(draws) > 1
        },
        "estimators": {name: {"estimator": recipe.estimator, "nfe": len(draws)} for name, draws in evaluations.items()},
        "parameters": model.num_parameters(),
        "training_tokens": recipe.steps * recipe.batch_size * recipe.text_length * arguments.world_size,
        "tokens_in_text": len(tokens),
        "validation_tokens": len(validation_tokens) // recipe.text_length * recipe.text_length,
        "family": recipe.family,
        "settings": _settings(recipe),
    }
    if trainer.is_world_process_zero():
        (recipe.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


MAY_CHANGE = ("output", "resume", "steps", "evaluate_every", "validation_texts", "store_half")
"""Settings with which a run may be continued that are not those it was begun with."""


def _settings(recipe: TrainingRecipe) -> dict[str, Any]:
    """The fields of a recipe as JSON has them."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(recipe).items()}
    return json.loads(json.dumps(plain))


def _settings_file(recipe: TrainingRecipe) -> Path:
    return recipe.output / "checkpoints" / "settings.json"


def _last_checkpoint(recipe: TrainingRecipe) -> str:
    """Where to go on: a run that was killed while it wrote a checkpoint goes on from the one before."""
    checkpoint = last_complete_checkpoint(recipe.output / "checkpoints")
    if checkpoint is None:
        raise ValueError(
            f"`output`={str(recipe.output)!r} holds no complete checkpoint to `resume` from. Leave out `resume`."
        )
    return str(checkpoint)


def _check_continued(recipe: TrainingRecipe) -> None:
    """Raise ValueError if a run is to be continued as another one."""
    if not recipe.resume or not _settings_file(recipe).is_file():
        return
    begun = json.loads(_settings_file(recipe).read_text())
    for name, value in _settings(recipe).items():
        if name not in MAY_CHANGE and begun.get(name) != value:
            raise ValueError(
                f"`{name}` is {value!r}, but the run in `output`={str(recipe.output)!r} was begun with "
                f"{begun.get(name)!r}. Continue it with that, or begin another one in another folder."
            )


def _load_texts(recipe: TrainingRecipe) -> tuple[list[str], list[str]]:
    """Documents to train and to validate on."""
    documents = load_text(recipe.text, recipe.dataset_config)
    if recipe.validation_text is not None:
        return documents, load_text(str(recipe.validation_text))
    assert recipe.validation_fraction is not None
    return split_text(documents, recipe.validation_fraction)


def _save(model: PreTrainedModel, weights: dict[str, torch.Tensor], tokenizer: Any, recipe: TrainingRecipe) -> None:
    # With a state dict of its own the config keeps the dtype to compute in. Tied weights are stored once.
    weights = {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}
    if recipe.store_half:
        weights = {name: weight.half() for name, weight in weights.items()}
    del model.config.use_cache  # Trainer has put one there; what the configuration's class says is right
    model.save_pretrained(recipe.output, state_dict=weights)
    tokenizer.save_pretrained(recipe.output)


def _whole_batches(data: TokenTexts, batch_size: int) -> Any:
    """`data` without the texts that would make up a smaller last batch."""
    if len(data) < batch_size:
        raise ValueError(f"There are {len(data)} texts, fewer than one batch of {batch_size}. Use more text.")
    return torch.utils.data.Subset(data, range(len(data) // batch_size * batch_size))


def split_text(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """The last documents, or the end of the only one, are held out."""
    if len(documents) == 1:
        cut = round(len(documents[0]) * (1 - validation_fraction))
        return [documents[0][:cut]], [documents[0][cut:]]
    cut = min(max(1, round(len(documents) * (1 - validation_fraction))), len(documents) - 1)
    return documents[:cut], documents[cut:]


def _arguments(recipe: TrainingRecipe) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(recipe.output / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": recipe.decay_steps, "decay_type": "linear"},
        weight_decay=recipe.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=recipe.bf16,
        eval_strategy="steps",
        eval_steps=recipe.evaluate_every,
        save_steps=recipe.evaluate_every,
        save_total_limit=2,
        logging_steps=10,
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to=[],
        seed=recipe.seed,
    )
