"""What the owner of a model does with the Hub, in a process of its own: `HF_ENDPOINT` is read at import.

    python hub_owner.py REPORT FOLDER

REPORT is JSON: exit status of the command, and what errors said.
"""

import json
import os
import sys
import time
import urllib.request
from pathlib import Path

from transformers import AutoModel

import hf_diffusion  # noqa: F401
from hf_diffusion.cli import main
from hf_diffusion.hub import ModelCardFacts


def message(error_type, call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except error_type as error:
        return str(error)
    raise AssertionError("no error")


def cut_uploads(whether):
    urllib.request.urlopen(urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/cut/{whether}", method="PUT", data=b""))


def own(folder):
    time.sleep = lambda seconds: None  # huggingface_hub waits half a minute between its tries
    model = AutoModel.from_pretrained(folder)
    report = {}
    output = Path("exported")
    report["export"] = main(["export", folder, str(output), "--push", "owner/exported", "--license", "mit"])

    cut_uploads("yes")
    report["cut"] = message(ConnectionError, model.push_to_hub, "owner/private", private=True)
    cut_uploads("no")
    facts = ModelCardFacts(training_data="Letters.")
    model.push_to_hub("owner/private", private=True, tags=["first"], model_card=facts)

    model.lm_head.weight.data *= 2
    facts = ModelCardFacts(license="mit")
    model.push_to_hub("owner/private", revision="second", tags=["later"], model_card=facts)
    report["forbidden"] = message(PermissionError, model.push_to_hub, "owner/private", token="hf_of_nobody")
    return report


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(own(sys.argv[2])))
