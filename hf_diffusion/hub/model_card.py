"""The model card of a saved model: how it is used, and what is known of it. What is not known is said to be not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData


NOT_KNOWN = "not known"

USE = """\
```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

`trust_remote_code=True` runs the code in this folder, for the tokenizer too, which reads the configuration. It needs
PyTorch and transformers (written with {transformers}). Where the package `hf_diffusion` is installed, import it and
leave `trust_remote_code` out: its own classes are then used.
"""

NO_TOKENIZER = """
There was no tokenizer in the folder when this card was written: put the one beside the model that it was trained with.
"""


@dataclass(frozen=True)
class Evaluation:
    """A negative log-likelihood or a bound of it, in nats per token.

    Attributes:
        estimator: what the number is and how it was found.
        nfe: network evaluations for each text.
    """

    value: float
    name: str
    standard_error: float | None = None
    estimator: str | None = None
    nfe: int | None = None
    data: str | None = None


@dataclass(frozen=True)
class ModelCardFacts:
    """What a model does not know of itself. None stands for what is not known.

    Attributes:
        name: what `from_pretrained` is called with: a name on the Hub or a folder.
        license: of the weights, as the Hub calls it: `apache-2.0`, `mit`, ...
        training_data: what the model was trained on, in words.
        evaluations: held-out losses.
        tags: for the Hub, besides those that say what kind of model it is.
    """

    name: str | None = None
    license: str | None = None
    training_data: str | None = None
    evaluations: Sequence[Evaluation] = ()
    tags: Sequence[str] = ()


def facts_of_training(results: Mapping[str, Any]) -> ModelCardFacts:
    """What `hf-diffusion train` wrote into `results.json`.

    Of files that were trained on, the name is told and not the folder.
    """
    settings = results["settings"]
    data = f"`{PurePath(settings['text']).name if settings['text'].endswith(('.txt', '.gz')) else settings['text']}`"
    if settings["dataset_config"] is not None:
        data += f" (`{settings['dataset_config']}`)"
    if settings["validation_text"] is not None:
        held_out = f"`{PurePath(settings['validation_text']).name}`"
    else:
        held_out = f"the last {settings['validation_fraction']:.0%} of the text"
    estimators = results.get("estimators", {})  # older runs did not say
    evaluations = [
        Evaluation(
            value=loss,
            name=name.replace("_", " "),
            standard_error=results["standard_error_nats_per_token"].get(name),
            estimator=estimators.get(name, {}).get("estimator"),
            nfe=estimators.get(name, {}).get("nfe"),
            data=f"{held_out}, {results['validation_tokens']:,} tokens",
        )
        for name, loss in results["validation_loss_nats_per_token"].items()
    ]
    return ModelCardFacts(
        training_data=f"{data}, {results['tokens_in_text']:,} tokens. Training read {results['training_tokens']:,} "
        "tokens, those read again counted again.",
        evaluations=evaluations,
    )


def make_model_card(model_class: Any, facts: ModelCardFacts, has_tokenizer: bool) -> ModelCard:
    """The card of a model that is saved with its code.

    Args:
        model_class: says which `family` it is of, and which `paper` describes it.
        facts: with a name.
    """
    name = str(facts.name)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=facts.license,
        tags=["masked-diffusion", "custom_code", model_class.config_class.model_type, *facts.tags],
    )
    sections = [
        f"# {PurePath(name).name}\n\n{model_class.family} ([paper]({model_class.paper})).\n",
        "## Use\n\n"
        + USE.format(name=name, transformers=transformers.__version__)
        + NO_TOKENIZER * (not has_tokenizer),
        f"## Training data\n\n{_sentence(facts.training_data)}\n",
        f"## Evaluation\n\n{_table(facts.evaluations)}\n",
        f"## Licence\n\nOf the weights: {facts.license or NOT_KNOWN}. Of the code: apache-2.0.\n",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(sections))


def _sentence(text: str | None) -> str:
    return text or NOT_KNOWN.capitalize() + "."


def _table(evaluations: Sequence[Evaluation]) -> str:
    if not evaluations:
        return _sentence(None)
    rows = [
        (
            evaluation.name,
            f"{evaluation.value:.3f}"
            + (f" ± {evaluation.standard_error:.3f}" if evaluation.standard_error is not None else ""),
            evaluation.estimator or NOT_KNOWN,
            str(evaluation.nfe or NOT_KNOWN),
            evaluation.data or NOT_KNOWN,
        )
        for evaluation in evaluations
    ]
    head = ("", "nats per token", "estimator", "network evaluations per text (NFE)", "data")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


__all__ = ["Evaluation", "ModelCardFacts", "facts_of_training", "make_model_card"]
