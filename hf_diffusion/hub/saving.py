"""What all models have in common: they can be saved with the code that they need, for machines without this package."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .flat_code import came_with_code, model_code
from .model_card import ModelCardFacts, make_model_card
from .upload import upload


logger = logging.get_logger(__name__)


class PreTrainedModelWithCode(PreTrainedModel):
    # What a family says about itself, for the model card.
    family: ClassVar[str]
    paper: ClassVar[str]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        include_code: bool = False,
        model_card: ModelCardFacts | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers, and with the code that the model needs where `hf_diffusion` is not installed.

        Args:
            include_code: write the code, and a model card if there is none. Such a folder loads through the Auto
                classes with `trust_remote_code=True`, and without where the package is installed. A model that was
                loaded with its code is saved with its code in any case.
            model_card: what the card says besides how the model is used.

        Raises:
            ValueError: before anything is written, for `push_to_hub` or `model_card` where they have no effect, and for
                a model with an adapter, of which only the adapter would be written.
            FileExistsError: before anything is written, if `model_card` is given and the folder has a card.
        """
        if push_to_hub and include_code:
            raise ValueError(
                "`push_to_hub=True` with `include_code=True` would upload the folder before the code is in it. Call "
                "`model.push_to_hub(repo_id)`, which uploads the code as well."
            )
        if model_card is not None and not include_code:
            raise ValueError("`model_card` has no effect without `include_code=True`. Set that, or leave it out.")
        only_adapter = getattr(self, "_hf_peft_config_loaded", False)
        if only_adapter and include_code:
            raise ValueError(
                "`include_code=True` has no effect with an adapter, which is saved without the model. Merge it into it "
                "first, or leave `include_code` out."
            )
        # `get_peft_model` wraps layers and does not tell the model. Saved like that, no model would find them.
        if include_code and any(hasattr(module, "base_layer") for module in self.modules()):
            raise ValueError(
                "`include_code=True` with layers that PEFT has wrapped would save them in a way that no model loads. "
                "Call `merge_and_unload()` of the PEFT model, and save what it returns."
            )
        folder = Path(save_directory)
        card_file = folder / "README.md"
        if model_card is not None and card_file.exists():
            raise FileExistsError(f"{card_file} exists already. Remove it, or leave out `model_card` to keep it.")
        with_code = include_code or (came_with_code(self.config) and not only_adapter)
        code = model_code(type(self.config)) if with_code and is_main_process else None
        super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
        if code is None:
            return
        code.write(folder)
        if include_code and card_file.exists():
            logger.warning(f"{card_file} is kept as it is. Remove it to have one written.")
        elif include_code:
            has_tokenizer = (folder / "tokenizer_config.json").exists()
            facts = model_card or ModelCardFacts()
            facts = dataclasses.replace(facts, name=facts.name or folder.resolve().name)
            make_model_card(type(self), facts, has_tokenizer).save(card_file)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        model_card: ModelCardFacts | None = None,
    ) -> str:
        """As in transformers, with the code that the model needs and with a model card, in one commit.

        Args:
            model_card: what the card says besides how the model is used. A card that is on the Hub stays.

        Returns:
            The address of the commit.

        Raises:
            PermissionError, ConnectionError: see `hub.upload`.
        """
        tags = tags or []
        facts = model_card or ModelCardFacts()
        facts = dataclasses.replace(facts, name=facts.name or repo_id, tags=[*facts.tags, *tags])
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_code=True, model_card=facts, max_shard_size=max_shard_size)
            return upload(
                Path(folder),
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                commit_description=commit_description,
                tags=tags,
            )


__all__ = ["PreTrainedModelWithCode"]
