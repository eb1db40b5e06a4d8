"""Teach the model that comes with the package another register with LoRA: from Shakespeare's plays to a garden diary.

    python examples/lora.py

garden.txt was written for this example, 14 kB, and has the licence of the package (Apache 2.0). Its last tenth is held
out. The adapter is 4 % of the size of the model.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

import hf_diffusion  # noqa: F401  # LoraConfig() then knows which layers to adapt
from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.training import OrderCollator, OrderCurriculum, TokenTexts


tokenizer = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)
text = Path(__file__).with_name("garden.txt").read_text(encoding="utf-8")
cut = round(0.9 * len(text))
training = TokenTexts(torch.tensor(tokenizer(text[:cut])["input_ids"]), length=64)
held_out = TokenTexts(torch.tensor(tokenizer(text[cut:])["input_ids"]), length=128).texts

model = AutoModel.from_pretrained(ARMD_SHAKESPEARE)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32))
model.print_trainable_parameters()


@torch.no_grad()
def held_out_loss(model):
    return float(model.eval()(held_out, labels=held_out).loss)


before = held_out_loss(model)
output = tempfile.mkdtemp()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output,
        max_steps=60,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    # Some tokens out of place, so that the model does not forget how to write in any order.
    data_collator=OrderCollator(OrderCurriculum(max_shuffled=8)),
    train_dataset=training,
)
trainer.train()
print(f"held-out loss: {before:.2f} nats per token before, {held_out_loss(model):.2f} after")

# The adapter alone is saved; merged into the weights it costs nothing any more.
model.save_pretrained(output)
model = PeftModel.from_pretrained(AutoModel.from_pretrained(ARMD_SHAKESPEARE), output).merge_and_unload()
prompt = tokenizer("The garden", return_tensors="pt")
for num_streams in (1, 4):
    sequences = model.generate(**prompt, strategy="strided", num_streams=num_streams, max_new_tokens=80, seed=0)
    print(f"\nin {num_streams} streams: {tokenizer.decode(sequences[0])}")
