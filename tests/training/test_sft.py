"""TRL's `SFTTrainer`: it learns answers and not their prompts, and fails where it would learn something else."""

import pytest
import torch
from transformers import AutoTokenizer

from hf_diffusion import ARMDConfig, ARMDForMaskedDiffusion, MDLMConfig, MDLMForMaskedDiffusion
from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.modeling.modeling_armd_causal import ARMDForCausalLM


trl = pytest.importorskip("trl", reason="needs TRL, of the extra `trl`")
Dataset = pytest.importorskip("datasets").Dataset

EXAMPLES = [
    {"prompt": "FOOL.\nWhat doth the owl?\n", "completion": "LEAR.\nThe owl hoots, boy."},
    {"prompt": "FOOL.\nWhat then?\n", "completion": "LEAR.\nNothing."},
]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)


def sft_trainer(model, tokenizer, folder):
    args = trl.SFTConfig(
        output_dir=str(folder),
        completion_only_loss=True,
        per_device_eval_batch_size=2,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    data = Dataset.from_list(EXAMPLES)
    return trl.SFTTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def test_loss_is_that_of_the_answers_in_the_left_to_right_order(tokenizer, tmp_path):
    config = ARMDConfig(vocab_size=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id, **SIZE)
    config.initializer_range = 0.3
    model = ARMDForCausalLM(config)
    any_order = ARMDForMaskedDiffusion(config).eval()
    any_order.load_state_dict(model.state_dict())
    log_likelihoods = []
    for example in EXAMPLES:
        prompt = tokenizer(example["prompt"])["input_ids"]
        answer = [*tokenizer(example["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = any_order(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        log_likelihoods += [float(log_probs[len(prompt) + n, token]) for n, token in enumerate(answer)]
    loss = sft_trainer(model, tokenizer, tmp_path).evaluate()["eval_loss"]
    assert loss == pytest.approx(-sum(log_likelihoods) / len(log_likelihoods), rel=1e-5)


def test_models_that_read_both_ways_fail(tokenizer, tmp_path):
    config = MDLMConfig(vocab_size=tokenizer.mask_token_id + 1, mask_token_id=tokenizer.mask_token_id, **SIZE)
    with pytest.raises(TypeError, match="use_cache"):
        sft_trainer(MDLMForMaskedDiffusion(config), tokenizer, tmp_path).train()
