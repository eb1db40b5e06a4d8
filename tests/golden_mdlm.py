"""The MDLM reference's own numbers, and its tiny models as published folders."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM


VARIANTS = ["subs", "subs_tc", "subs_bertmask"]


@dataclass
class Golden:
    folder: Path
    tensors: dict[str, torch.Tensor]
    mask_token_id: int
    seeds: dict[str, int]

    def __getitem__(self, name):
        return self.tensors[name]

    def model(self, auto_class=AutoModelForMaskedLM, **settings):
        # A published config does not name its mask token; it is the last one unless the tokenizer has one of its own.
        if self.folder.name == "subs_bertmask":
            settings["mask_token_id"] = self.mask_token_id
        return auto_class.from_pretrained(self.folder / "hf", **settings).eval()

    def noise(self, model):
        """What the network has to be told."""
        return {"sigma": self["sigma"]} if model.config.time_conditioning else {}

    def labels(self):
        return self["x0"].masked_fill(self["attention_mask"] == 0, -100)


def load_golden(shared, variant):
    folder = shared / "golden/mdlm" / variant
    facts = json.loads((folder / "golden.json").read_text())
    return Golden(folder, load_file(folder / "golden.safetensors"), facts["mask_index"], facts["seeds"])
