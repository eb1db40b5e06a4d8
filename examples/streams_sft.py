"""Teach a chat model to answer in parallel streams: supervised fine-tuning, in which only the answers are learned.

    python examples/streams_sft.py [MODEL]

MODEL is a chat model, by folder or Hub name, and gets a LoRA adapter. Without one a tiny Llama learns from nothing.

Streams are laid out before the first token is drawn, so every answer has the same number of places, and end tokens fill
what it does not need: how long an answer is, is learned with it.
"""

import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_diffusion.checkpoints import ARMD_SHAKESPEARE
from hf_diffusion.conversion import from_causal_lm
from hf_diffusion.training import CurriculumCallback, OrderCollator, OrderCurriculum


BEASTS = {"lion": "roars", "wolf": "howls", "owl": "hoots", "lamb": "bleats", "bee": "hums", "raven": "croaks"}
PLACES = 16
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)

torch.manual_seed(0)
if len(sys.argv) > 1:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = from_causal_lm(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32))
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, modules_to_save=["gap"]))
else:
    tokenizer = AutoTokenizer.from_pretrained(ARMD_SHAKESPEARE, chat_template=PLAIN)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id, **size)
    config.bos_token_id = None
    model = from_causal_lm(LlamaForCausalLM(config))


def prompt_of(beast):
    question = [{"role": "user", "content": f"What doth the {beast}, nuncle?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def example(beast, sound):
    prompt = prompt_of(beast)
    answer = tokenizer(f"The {beast} {sound}, boy.", add_special_tokens=False)["input_ids"]
    answer += [tokenizer.eos_token_id] * (PLACES - len(answer))
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


# Prompts are given, from left to right; answers in one, two or four streams.
collator = OrderCollator(OrderCurriculum(strided_start=0, num_streams=(1, 2, 4)))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=150,
        learning_rate=5e-3 if len(sys.argv) == 1 else 1e-3,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=6,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    data_collator=collator,
    train_dataset=[example(beast, sound) for beast, sound in BEASTS.items()],
    callbacks=[CurriculumCallback(collator)],
)
trainer.train()

model.eval()
for num_streams in (1, 2, 4):
    for beast in ("owl", "raven"):
        prompt = torch.tensor([prompt_of(beast)])
        settings = {"strategy": "strided", "num_streams": num_streams, "max_new_tokens": PLACES, "do_sample": False}
        answer = model.generate(input_ids=prompt, **settings)[0, prompt.shape[1] :]
        print(f"in {num_streams} streams: {tokenizer.decode(answer, skip_special_tokens=True)}")
