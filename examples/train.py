"""Train a small ARMD with `transformers.Trainer`: a collator that draws orders is all that it needs.

    python examples/train.py [TEXT_FILE]

`hf-diffusion train` does the same with a tokenizer, held-out losses, averaged weights and curves.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from hf_diffusion import ARMDConfig, ARMDForMaskedDiffusion
from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.training import CurriculumCallback, OrderCollator, OrderCurriculum, TokenTexts


tokenizer = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)
text = Path(sys.argv[1] if len(sys.argv) > 1 else __file__).read_text(encoding="utf-8")
tokens = torch.tensor(tokenizer(text)["input_ids"])

model = ARMDForMaskedDiffusion(
    ARMDConfig(
        vocab_size=tokenizer.mask_token_id,  # the mask is the first id outside the vocabulary
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        left_neighbour=True,
    )
)
# Left to right for 20 steps, up to 8 tokens out of place until step 40, then strided.
collator = OrderCollator(OrderCurriculum(ramp_start=20, ramp_end=40, max_shuffled=8, strided_start=45))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=60,
        learning_rate=2e-3,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
    ),
    data_collator=collator,
    train_dataset=TokenTexts(tokens, length=64),
    callbacks=[CurriculumCallback(collator)],
)
trainer.train()
