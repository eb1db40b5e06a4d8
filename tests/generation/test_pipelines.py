"""transformers' pipelines on a folder of each family: they write and fill as the model itself does."""

import json
import shutil

import pytest
import torch
from tiny_mdlm import tiny, tiny_lomdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_diffusion import ARMDForCausalLM, LoMDMForMaskedDiffusion, MDLMForMaskedDiffusion
from hf_diffusion.checkpoints import ARMD_SHAKESPEARE


PROMPT = "KING HENRY.\n"
SETTINGS = {"max_new_tokens": 16, "do_sample": False}


def strided_armd(folder):
    shutil.copytree(ARMD_SHAKESPEARE, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings.update(strategy="strided", num_streams=4)
    (folder / "generation_config.json").write_text(json.dumps(settings))


def mdlm(make, folder):
    make(torch.float32, vocab_size=2049, mask_token_id=2048, eos_token_id=2047).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE).save_pretrained(folder)


FOLDERS = {
    "armd": (lambda folder: shutil.copytree(ARMD_SHAKESPEARE, folder), ARMDForCausalLM),
    "armd_strided": (strided_armd, ARMDForCausalLM),
    "mdlm": (lambda folder: mdlm(tiny, folder), MDLMForMaskedDiffusion),
    "lomdm": (lambda folder: mdlm(tiny_lomdm, folder), LoMDMForMaskedDiffusion),
}


@pytest.fixture(params=FOLDERS)
def loaded(request, tmp_path):
    """(folder, the class that writes, model, tokenizer)"""
    make, causal_class = FOLDERS[request.param]
    folder = tmp_path / "model"
    make(folder)
    return str(folder), causal_class, AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def text_of(model, tokenizer, prompt):
    torch.manual_seed(3)  # some strategies draw the order
    sequences = model.generate(**tokenizer(prompt, return_tensors="pt"), **SETTINGS)
    return tokenizer.decode(sequences[0], skip_special_tokens=True)


def test_text_generation(loaded):
    folder, causal_class, model, tokenizer = loaded
    pipe = pipeline("text-generation", model=folder)
    assert type(pipe.model) is causal_class
    torch.manual_seed(3)
    assert pipe(PROMPT, **SETTINGS)[0]["generated_text"] == text_of(model, tokenizer, PROMPT)
    assert pipe(PROMPT, max_new_tokens=16)[0]["generated_text"].startswith(PROMPT)


def test_text_generation_for_prompts_of_different_lengths():
    pipe = pipeline("text-generation", model=str(ARMD_SHAKESPEARE))
    model, tokenizer = AutoModel.from_pretrained(ARMD_SHAKESPEARE), AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)
    prompts = [PROMPT, "The"]
    texts = [output[0]["generated_text"] for output in pipe(prompts, batch_size=2, **SETTINGS)]
    assert texts == [text_of(model, tokenizer, prompt) for prompt in prompts]


def test_fill_mask(loaded):
    folder, _, model, tokenizer = loaded
    pipe = pipeline("fill-mask", model=folder)
    tops = []
    for text in ("my lord<|mask|> Hamlet", "my lord<|mask|>, the king is dead"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        position = int((ids[0] == tokenizer.mask_token_id).nonzero())
        expected = model(ids).logits[0, position].softmax(-1).max()
        tops.append(pipe(text, top_k=1)[0]["score"])
        assert tops[-1] == pytest.approx(expected.item(), rel=1e-4)
    assert tops[0] != tops[1]


def test_the_strategy_of_a_folder_is_kept_by_the_causal_form(tmp_path):
    strided_armd(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    for auto_class in (AutoModel, AutoModelForCausalLM):
        config = auto_class.from_pretrained(tmp_path / "again").generation_config
        assert (config.strategy, config.num_streams, config.eos_token_id) == ("strided", 4, 2047)
