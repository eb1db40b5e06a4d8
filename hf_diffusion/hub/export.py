"""A model folder as one that loads without this package. Weights and tokenizer are copied as they are."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig
from transformers.utils import logging

from ..conversion.output_folder import check_free, new_folder
from .flat_code import model_code
from .model_card import ModelCardFacts, facts_of_training, make_model_card


logger = logging.get_logger(__name__)

RESULTS = "results.json"
LEFT_OUT = ("config.json", RESULTS, "*.py", ".*")
"""Files that are written anew, are told of in the card, or are of other code."""


def export_model(source: str | Path, output: str | Path, name: str | None = None, **facts: Any) -> None:
    """Write `source` with the code that it needs to the folder `output`, in full or not at all.

    Args:
        source: a folder or a name on the Hub. A model card in it is copied.
        name: what `from_pretrained` will be called with, for a new card; the name of `output` if not given.
        facts: fields of `ModelCardFacts`, in place of what `hf-diffusion train` has left in the folder.

    Raises:
        FileExistsError: if `output` exists and is not an empty folder, or if there are `facts` and a card.
        ValueError: if `source` holds no weights, or a model of another package.
    """
    output = Path(output)
    check_free(output)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    code = model_code(type(config))
    folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source), ignore_patterns=["*.py"]))
    files = [file for file in folder.iterdir() if file.is_file() and not any(map(file.match, LEFT_OUT))]
    if not any(file.suffix in (".safetensors", ".bin") for file in files):
        raise ValueError(f"`source`={str(source)!r} holds no weights. Name one that `save_pretrained` has written.")
    has_card = (folder / "README.md").exists()
    if has_card and facts:
        raise FileExistsError(
            f"`{next(iter(facts))}` would have no effect: `source`={str(source)!r} has a model card, README.md, which "
            "is kept. Write it there."
        )
    card_facts = dataclasses.replace(_facts_left_in(folder), name=name or output.name, **facts)
    with new_folder(output) as partial:
        for file in files:
            shutil.copyfile(file, partial / file.name)
        config.save_pretrained(partial)
        code.write(partial)
        if has_card:
            logger.warning(f"README.md is copied from {source} as it is: it may not say how to load the model now.")
        else:
            has_tokenizer = (partial / "tokenizer_config.json").exists()
            make_model_card(code.auto_classes["AutoModel"], card_facts, has_tokenizer).save(partial / "README.md")


def _facts_left_in(folder: Path) -> ModelCardFacts:
    results = folder / RESULTS
    return facts_of_training(json.loads(results.read_text())) if results.exists() else ModelCardFacts()


__all__ = ["export_model"]
