"""Fill gaps in a batch of uneven texts: a masked position in the prompt is a position to fill.

python examples/infill.py
"""

import torch
from transformers import AutoModel, AutoTokenizer

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE


tokenizer = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)
model = AutoModel.from_pretrained(ARMD_SHAKESPEARE).eval()

gap = tokenizer.mask_token
texts = [
    f"Good morrow, my lord.{gap * 12} I thank thee, gentle friend.",
    f"{gap * 6} is dead, and all the world{gap * 8}.",
]
prompt = tokenizer(texts, return_tensors="pt", padding=True)
sequences = model.generate(**prompt, do_sample=True, temperature=0.7, generator=torch.Generator().manual_seed(0))
for before, after in zip(texts, sequences, strict=True):
    print(before.replace(gap, "_"))
    print("  ->", tokenizer.decode(after, skip_special_tokens=True), "\n")
