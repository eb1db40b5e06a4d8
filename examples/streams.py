"""Draw one text in four parallel streams, and ask how likely the model finds it.

python examples/streams.py
"""

import torch
from transformers import AutoModel, AutoTokenizer

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE


tokenizer = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)
model = AutoModel.from_pretrained(ARMD_SHAKESPEARE).eval()

prompt = tokenizer("KING HENRY.\n", return_tensors="pt")
output = model.generate(
    **prompt,
    strategy="strided",
    num_streams=4,
    max_new_tokens=160,
    temperature=0.9,
    generator=torch.Generator().manual_seed(0),
    return_dict_in_generate=True,
)
print(tokenizer.decode(output.sequences[0]))
print(f"\n{output.nfe} passes, {float(output.tokens_per_forward[0]):.2f} tokens per forward")

with torch.no_grad():
    loss = model(output.sequences, labels=output.sequences).loss
print(f"{loss:.2f} nats per token, left to right")
