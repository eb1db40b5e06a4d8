"""Teach the model that comes with the package to answer, with TRL's `SFTTrainer`: only the answers are learned.

    pip install "hf-diffusion[trl]"
    python examples/sft.py

SFTTrainer is for causal language models: `AutoModelForCausalLM` gives ARMD left to right, with the same weights. Models
that read both ways learn from `Trainer` with `labels` that are -100 at the prompt (docs/training.md).
"""

import tempfile

from datasets import Dataset
from peft import LoraConfig, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_diffusion  # noqa: F401  # registers the model families with the Auto classes
from hf_diffusion.checkpoints import ARMD_SHAKESPEARE


BEASTS = {"lion": "roars", "wolf": "howls", "owl": "hoots", "lamb": "bleats", "bee": "hums", "raven": "croaks"}
dataset = Dataset.from_list(
    [
        {"prompt": f"FOOL.\nWhat doth the {beast}, nuncle?\n", "completion": f"LEAR.\nThe {beast} {sound}, boy."}
        for beast, sound in BEASTS.items()
    ]
)

tokenizer = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE)
model = AutoModelForCausalLM.from_pretrained(ARMD_SHAKESPEARE)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=tempfile.mkdtemp(),
        completion_only_loss=True,
        max_steps=60,
        learning_rate=5e-3,
        per_device_train_batch_size=6,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=32, task_type=TaskType.CAUSAL_LM),
)
trainer.train()

model = trainer.model.merge_and_unload().eval()
prompts = tokenizer(list(dataset["prompt"]), return_tensors="pt", padding=True, padding_side="left")
answers = model.generate(**prompts, max_new_tokens=24, do_sample=False)
for answer in tokenizer.batch_decode(answers, skip_special_tokens=True):
    print(answer.replace("\n", " "))
