"""What goes with which family: each refusal names the setting and the reason, before any pass."""

import pytest
import torch
from families import FAMILIES

from hf_diffusion import DiffusionGenerationConfig


PROMPT = torch.tensor([[1, 2, 3]])
IN_BLOCKS = {"strategy": "semi_autoregressive", "block_length": 2}
ANCESTRAL = {"strategy": "ancestral", "max_denoising_steps": 2}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("armd", {"strategy": "confidence"}, "in the order in which they are drawn, which is therefore laid down"),
        ("armd", {**IN_BLOCKS, "block_strategy": "entropy"}, 'strategy "entropy" chooses positions as it goes'),
        ("armd", {**ANCESTRAL, "remasking": "cap", "remasking_strength": 0.5}, "`remasking`='cap' has no effect here"),
        ("armd", {**ANCESTRAL, "reference_sampler": "ddpm"}, "`reference_sampler`='ddpm' has no effect here"),
        ("armd", {**IN_BLOCKS, "approximate_cache": True}, "`approximate_cache`=True has no effect here: the cache .*"),
        ("armd", {**IN_BLOCKS, "sliding_window": True}, "`sliding_window`=True has no effect here: .* reads all of"),
        ("mdlm", {"use_cache": True}, "`use_cache`=True: every position .* reads every other one"),
        (
            "mdlm",
            {"generation_config": DiffusionGenerationConfig(use_cache=True)},
            "`use_cache`=True: every position .* reads every other one",
        ),
        ("mdlm", {**ANCESTRAL, "remasking": "cap", "remasking_strength": 0}, "`remasking_strength` is 0, which takes"),
        ("mdlm", {**ANCESTRAL, "approximate_cache": True}, '`approximate_cache`=True has no effect with `strategy="an'),
        ("mdlm", {**ANCESTRAL, "remasking": "cap"}, "`remasking` .'cap'. and `remasking_strength` .None. go together"),
        ("mdlm", {**ANCESTRAL, "remasking": "loop", "remasking_strength": 0.5}, "`remasking` must be one of"),
        ("mdlm", {**ANCESTRAL, "remasking": "cap", "remasking_strength": 1.5}, "`remasking_strength` must lie between"),
        ("mdlm", {"strategy": "confidence", "confidence_threshold": -1}, "`confidence_threshold` must lie between"),
        ("mdlm", {"strategy": "entropy", "entropy_bound": "0.5"}, "`entropy_bound` must be a number, got '0.5'"),
        ("mdlm", {"strategy": "confidence", "entropy_bound": 0.5}, "`entropy_bound`=0.5 has no effect with .*entropy"),
        ("mdlm", {"strategy": "ancestral"}, "needs `max_denoising_steps`"),
        ("mdlm", {"strategy": "semi_autoregressive"}, "needs `block_length`"),
        ("mdlm_blocks", {"strategy": "first_hitting"}, "this model draws blocks of 4 positions from left to right"),
        ("mdlm_blocks", IN_BLOCKS, "`block_length` .2. must be the model's own `block_size` .4."),
        ("mdlm_blocks", {**IN_BLOCKS, "approximate_cache": True, "block_length": 4}, "the cache of .* is exact"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else value if len(value) < 12 else "",
)
def test_refused(name, arguments, message):
    model = FAMILIES[name].model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made before the error"))
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, max_new_tokens=6, **arguments)
