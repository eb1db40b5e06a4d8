"""Training a model from text, end to end: tokenizer, model, data, curriculum, averaged weights, evaluation, files."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from ..diffusion import orders
from ..modeling.configuration_armd import ARMDConfig
from ..modeling.modeling_armd import ARMDForMaskedDiffusion
from .curriculum import CurriculumCallback, OrderCollator, OrderCurriculum
from .curves import LossCurveCallback
from .data import MASK, TokenBlocks, load_text, tokenize, train_tokenizer
from .ema import EMACallback


@dataclass
class TrainingSettings:
    """What `hf-diffusion train` takes; every field is a flag of the same name."""

    text: str = field(metadata={"help": "a text file (.txt or .gz), or a data set on the Hub"})
    output: Path = field(metadata={"help": "folder for the model, its tokenizer, curves and results"})
    family: str = field(
        default="armd", metadata={"help": "armd, or llama: an ordinary autoregressive model to compare with"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the data set"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or Hub name; a new one is trained if not given"}
    )
    vocab_size: int = field(default=2048, metadata={"help": "of the tokenizer that is trained"})
    validation_fraction: float = field(default=0.1, metadata={"help": "share of the text, at its end, to validate on"})
    validation_blocks: int = field(
        default=32, metadata={"help": "blocks used to validate while training; all at the end"}
    )
    validation_streams: tuple[int, ...] = field(
        default=(1, 2, 4, 8), metadata={"help": "numbers of streams to validate ARMD with; 1 is left to right"}
    )
    hidden_size: int = field(default=256, metadata={"help": "width of the model"})
    num_hidden_layers: int = field(default=4, metadata={"help": "number of layers"})
    num_attention_heads: int = field(default=8, metadata={"help": "number of attention heads"})
    dropout: float = field(default=0.0, metadata={"help": "on embeddings and sublayers (llama: on attention)"})
    left_neighbour: bool = field(default=True, metadata={"help": "add the left neighbour to ARMD's query stream"})
    block_length: int = field(default=256, metadata={"help": "tokens in a training text"})
    batch_size: int = field(default=8, metadata={"help": "texts per process and step"})
    steps: int = field(default=1000, metadata={"help": "optimiser steps"})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "after warm-up"})
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up"})
    decay_fraction: float = field(
        default=0.2, metadata={"help": "share of the steps, at the end, in which it falls to 0"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "of AdamW"})
    ramp_start: float = field(default=0.3, metadata={"help": "share of the steps read left to right"})
    ramp_end: float = field(default=0.5, metadata={"help": "share at which max_shuffled is reached"})
    strided_start: float = field(
        default=0.75, metadata={"help": "share at which the strided phase begins; 1 for never"}
    )
    max_shuffled: int = field(default=32, metadata={"help": "tokens out of place at the end of the ramp (rho)"})
    num_streams: tuple[int, ...] = field(default=(1, 2, 4), metadata={"help": "of the strided phase"})
    shuffle: str = field(default="subset", metadata={"help": "subset, windows or ranks"})
    ema_decay: float = field(default=0.999, metadata={"help": "of the averaged weights, which are the ones saved"})
    evaluate_every: int = field(default=250, metadata={"help": "steps between evaluations and checkpoints"})
    seed: int = field(default=0, metadata={"help": "of weights, data order and orders"})
    store_half: bool = field(
        default=False, metadata={"help": "store weights in float16; they are loaded and used in float32 all the same"}
    )
    bf16: bool = field(default=False, metadata={"help": "train in bfloat16 mixed precision"})
    resume: bool = field(default=False, metadata={"help": "continue from the last checkpoint in the output folder"})

    def __post_init__(self) -> None:
        if self.family not in ("armd", "llama"):
            raise ValueError(f"`family` must be armd or llama, got {self.family!r}.")
        for name in ("steps", "batch_size", "block_length", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be between 0 and 1, got {self.validation_fraction}.")
        if not self.validation_streams or min(self.validation_streams) < 1:
            raise ValueError(f"`validation_streams` must hold positive numbers, got {self.validation_streams!r}.")
        if self.block_length < max(self.validation_streams):
            raise ValueError(
                f"`block_length` must be at least the most streams validated ({max(self.validation_streams)}), got "
                f"{self.block_length}. Raise it, or lower `validation_streams`."
            )
        if self.tokenizer is None and self.vocab_size < 258:
            raise ValueError(
                f"`vocab_size` must be at least 258 (every byte, and the end of text), got {self.vocab_size}."
            )
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")
        if self.validation_blocks < 1:
            raise ValueError(f"`validation_blocks` must be at least 1, got {self.validation_blocks}.")
        if not 0 <= self.decay_fraction <= 1 or self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"`warmup_steps` ({self.warmup_steps}) and the decay ({self.decay_steps} steps) do not fit into "
                f"`steps` ({self.steps}). Lower `warmup_steps` or `decay_fraction`."
            )
        self.curriculum()

    @property
    def decay_steps(self) -> int:
        return round(self.decay_fraction * self.steps)

    def curriculum(self) -> OrderCurriculum:
        return OrderCurriculum(
            ramp_start=round(self.ramp_start * self.steps),
            ramp_end=round(self.ramp_end * self.steps),
            max_shuffled=self.max_shuffled,
            strided_start=round(self.strided_start * self.steps) if self.strided_start < 1 else None,
            num_streams=self.num_streams,
            shuffle=self.shuffle,  # type: ignore[arg-type]
        )


class StartSymbolCollator:
    """Batches for an ordinary causal model: a start token before each text, so that it too predicts every token."""

    def __init__(self, start_token_id: int) -> None:
        self.start_token_id = start_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = torch.stack([example["input_ids"] for example in examples])
        input_ids = torch.cat([torch.full_like(texts[:, :1], self.start_token_id), texts], dim=1)
        return {"input_ids": input_ids, "labels": input_ids}


def build_model(settings: TrainingSettings, vocab_size: int, tokenizer: Any) -> PreTrainedModel:
    """A fresh model; the two families have the same number of parameters up to ARMD's first layer."""
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_attention_heads": settings.num_attention_heads,
        "max_position_embeddings": settings.block_length,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if settings.family == "llama":
        # Three matrices of 8/3 of the width hold what two of 4 times the width hold.
        return LlamaForCausalLM(
            LlamaConfig(
                **shared,
                intermediate_size=settings.hidden_size * 8 // 3,
                attention_dropout=settings.dropout,
                bos_token_id=None,
            )
        )
    return ARMDForMaskedDiffusion(
        ARMDConfig(
            **shared,
            residual_dropout=settings.dropout,
            left_neighbour=settings.left_neighbour,
            mask_token_id=tokenizer.mask_token_id,
        )
    )


def train(settings: TrainingSettings) -> dict[str, Any]:
    """Train a model, write it with everything that belongs to it into `settings.output`, and return its results.

    Losses are in nats per token on the held-out end of the text: left to right, and in strided order with 2, 4 and 8
    streams for ARMD.
    """
    if not settings.resume and any(settings.output.glob("checkpoints/checkpoint-*")):
        raise ValueError(
            f"`output`={str(settings.output)!r} holds checkpoints of another run. Continue it with `resume`, or name "
            "another folder."
        )
    documents = load_text(settings.text, settings.dataset_config)
    training_text, validation_text = split_text(documents, settings.validation_fraction)
    if settings.tokenizer is None:
        tokenizer = train_tokenizer(training_text, settings.vocab_size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
        if tokenizer.mask_token_id is None:
            tokenizer.add_special_tokens({"mask_token": MASK})
    # A mask symbol that comes last needs no row in the embedding.
    vocab_size = len(tokenizer) - (tokenizer.mask_token_id == len(tokenizer) - 1)
    tokens, validation_tokens = tokenize(training_text, tokenizer), tokenize(validation_text, tokenizer)
    data = TokenBlocks(tokens, settings.block_length)
    validation = TokenBlocks(validation_tokens, settings.block_length)

    arguments = _arguments(settings)
    torch.manual_seed(settings.seed)
    model = build_model(settings, vocab_size, tokenizer)
    ema = EMACallback(settings.ema_decay)
    callbacks: list[Any] = [ema]
    evaluations: dict[str, TokenBlocks] = {"left_to_right": validation}
    collator: Any = StartSymbolCollator(tokenizer.eos_token_id)
    phases = None
    if settings.family == "armd":
        curriculum = settings.curriculum()
        collator = OrderCollator(curriculum, settings.seed)
        callbacks.append(CurriculumCallback(collator))
        phases = {"ramp": curriculum.ramp_start, f"{curriculum.max_shuffled} shuffled": curriculum.ramp_end}
        if curriculum.strided_start is not None:
            phases["strided"] = curriculum.strided_start
        evaluations = {
            "left_to_right" if streams == 1 else f"{streams}_streams": TokenBlocks(
                validation_tokens, settings.block_length, orders.strided_steps(settings.block_length, streams)
            )
            for streams in settings.validation_streams
        }
    callbacks.append(LossCurveCallback(phases))
    while_training = {
        name: torch.utils.data.Subset(blocks, range(min(settings.validation_blocks, len(blocks))))
        for name, blocks in evaluations.items()
    }
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=_whole_batches(data, settings.batch_size * arguments.world_size),
        eval_dataset=while_training,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=settings.resume or None)
    with ema.applied(model):
        if trainer.is_world_process_zero():
            _save(model, tokenizer, settings)
        losses = {
            name: trainer.evaluate(blocks, metric_key_prefix="final")["final_loss"]  # type: ignore[arg-type]
            for name, blocks in evaluations.items()
        }
    results = {
        "validation_loss_nats_per_token": losses,
        "parameters": model.num_parameters(),
        "training_tokens": settings.steps * settings.batch_size * settings.block_length * arguments.world_size,
        "tokens_in_text": len(tokens),
        "validation_tokens": len(validation) * settings.block_length,
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(settings).items()},
    }
    if trainer.is_world_process_zero():
        (settings.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def _save(model: PreTrainedModel, tokenizer: Any, settings: TrainingSettings) -> None:
    weights = model.state_dict()
    if settings.store_half:
        # With a state dict of its own the config keeps the dtype to compute in. Tied weights are stored once.
        tied = model.all_tied_weights_keys
        weights = {name: weight.half() for name, weight in weights.items() if name not in tied}
    model.config.use_cache = True  # which Trainer switches off
    model.save_pretrained(settings.output, state_dict=weights)
    tokenizer.save_pretrained(settings.output)


def _whole_batches(data: TokenBlocks, batch_size: int) -> Any:
    """`data` without the blocks that would make up a smaller last batch."""
    if len(data) < batch_size:
        raise ValueError(f"The text has {len(data)} blocks, fewer than one batch of {batch_size}. Use more text.")
    return torch.utils.data.Subset(data, range(len(data) // batch_size * batch_size))


def split_text(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """The last documents, or the end of the only one, are held out."""
    if len(documents) == 1:
        cut = round(len(documents[0]) * (1 - validation_fraction))
        return [documents[0][:cut]], [documents[0][cut:]]
    cut = min(max(1, round(len(documents) * (1 - validation_fraction))), len(documents) - 1)
    return documents[:cut], documents[cut:]


def _arguments(settings: TrainingSettings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(settings.output / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": settings.decay_steps, "decay_type": "linear"},
        weight_decay=settings.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=settings.bf16,
        eval_strategy="steps",
        eval_steps=settings.evaluate_every,
        save_steps=settings.evaluate_every,
        save_total_limit=2,
        logging_steps=10,
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to=[],
        seed=settings.seed,
    )
