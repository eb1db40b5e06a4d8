"""LoRA by PEFT on every family: what is adapted, trained, saved, loaded, merged, switched, and what is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, NUM_TOKENS
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoModel, Trainer, TrainingArguments

from hf_diffusion import MDLMARConfig, MDLMARForCausalLM


LINEAR_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
TASKS = (None, TaskType.CAUSAL_LM)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def text(batch=2, length=9):
    return torch.randint(NUM_TOKENS, (batch, length), generator=torch.Generator().manual_seed(2))


def adapted(family, task=None, **settings):
    """A model with an adapter that changes what it says: fresh ones add nothing."""
    model = get_peft_model(family.model(torch.float64), LoraConfig(r=2, task_type=task, **settings))
    stir(model)
    return model


def stir(model, adapter="default", seed=7):
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            weight.data.normal_(std=0.3, generator=generator)


def logits(model):
    return model(text()).logits


TABLE = "from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table;"
"""Where PEFT keeps default targets by `model_type`."""


def run(code):
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


class TestDefaultTargets:
    def test_are_the_linear_maps_of_all_layers_and_nothing_else(self, family):
        model = get_peft_model(family.model(), LoraConfig())
        hit = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
        assert {name.rsplit(".", 1)[1] for name in hit} == family.lora_layers
        layers = sum(type(module).__name__.endswith("Layer") for module in family.model().modules())
        assert len(hit) == len(family.lora_layers) * layers

    def test_are_found_for_the_autoregressive_baseline(self):
        config = MDLMARConfig(vocab_size=23, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        model = get_peft_model(MDLMARForCausalLM(config), LoraConfig(task_type=TaskType.CAUSAL_LM))
        assert len(model.targeted_module_names) == 2 * len(LINEAR_LAYERS)

    def test_are_those_that_the_docs_state(self):
        page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
        stated = {
            model_type: set(re.findall(r"`(\w+)`", targets))
            for model_type, targets in re.findall(r"^\| `(\w+)` \| (`.*) \|$", page, re.MULTILINE)
        }
        names = ("armd", "mdlm", "lomdm", "mdlm_ar", "causal_streams")
        assert stated == {name: set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[name]) for name in names}

    @pytest.mark.slow  # a process of its own
    def test_are_told_to_peft_when_it_is_imported(self):
        code = "import sys; import hf_diffusion; hf_diffusion.register_lora_targets(); print('peft' in sys.modules);"
        code += TABLE + "print([sorted(table[name]) for name in ('armd', 'mdlm', 'lomdm', 'mdlm_ar')]);"
        code += "print(any('hf_diffusion' in type(finder).__module__ for finder in sys.meta_path))"
        assert run(code) == f"False\n{[sorted(LINEAR_LAYERS)] * 4}\nFalse\n"

    @pytest.mark.slow  # a process of its own
    def test_are_told_to_peft_if_it_is_there_already_and_what_the_user_has_chosen_stays(self):
        code = f"import peft; {TABLE} table['armd'] = ['q_proj']; import hf_diffusion; "
        code += "print(table['armd'], 'mdlm' in table)"
        assert run(code).strip() == "['q_proj'] True"


class TestTraining:
    def test_reaches_every_adapter_and_nothing_else(self, family):
        model = adapted(family).train()
        for inputs in family.loss_inputs:
            family.loss(model, text(), **inputs).backward()
        untouched = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
        assert untouched == {name for name, _ in model.named_parameters() if "lora_" not in name}

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, family, use_reentrant):
        gradients = []
        for checkpointing in (False, True):
            model = adapted(family)
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.train()
            family.loss(model, text()).backward()
            gradients.append([weight.grad for name, weight in model.named_parameters() if "lora_" in name])
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize(("task", "gradient_checkpointing"), [(None, False), (TaskType.CAUSAL_LM, True)])
    def test_trainer_learns_a_text_by_heart_and_leaves_the_model_as_it_was(
        self, family, task, gradient_checkpointing, tmp_path
    ):
        model = get_peft_model(family.model(), LoraConfig(r=8, lora_alpha=32, task_type=task))
        before = {name: weight.clone() for name, weight in model.named_parameters() if "lora_" not in name}
        first = float(family.loss(model, text()).detach())
        args = TrainingArguments(
            output_dir=tmp_path,
            max_steps=30,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            gradient_checkpointing=gradient_checkpointing,
            seed=0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        data = [{"input_ids": row, "labels": row} for row in text()]
        Trainer(model=model, args=args, train_dataset=data).train()
        assert float(family.loss(model.eval(), text()).detach()) < 0.7 * first
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], weight) for name, weight in before.items())


class TestAdapters:
    @pytest.fixture(autouse=True)
    def without_gradients(self):
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("task", TASKS)
    def test_add_a_product_of_two_small_matrices_to_the_weights(self, family, task):
        model, plain = adapted(family, task, lora_alpha=6), family.model(torch.float64)
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                change = module.lora_B["default"].weight @ module.lora_A["default"].weight * 6 / 2
                plain.get_submodule(name).weight += change
        assert not torch.allclose(logits(model), logits(family.model(torch.float64)))
        torch.testing.assert_close(logits(model), logits(plain))
        torch.testing.assert_close(logits(model.merge_and_unload()), logits(plain))

    @pytest.mark.parametrize("task", TASKS)
    def test_are_saved_and_loaded(self, family, task, tmp_path):
        family.model(torch.float64).save_pretrained(tmp_path / "base")
        base = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float64)
        model = get_peft_model(base, LoraConfig(r=2, task_type=task))
        stir(model)
        model.save_pretrained(tmp_path / "adapter")
        base = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float64)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(model))
        # transformers finds the base by itself.
        whole = AutoModel.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
        assert type(whole) is type(family.model())
        torch.testing.assert_close(logits(whole), logits(model))

    def test_merged_into_the_weights_need_no_peft_any_more(self, family, tmp_path):
        model = adapted(family)
        expected = logits(model)
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path, include_code=True)
        loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
        assert not [name for name, _ in loaded.named_parameters() if "lora_" in name]
        torch.testing.assert_close(logits(loaded), expected)

    def test_are_switched(self, family):
        model = adapted(family)
        first = logits(model)
        model.add_adapter("second", LoraConfig(r=3))
        stir(model, "second", seed=8)
        torch.testing.assert_close(logits(model), first)
        model.set_adapter("second")
        second = logits(model)
        assert not torch.allclose(first, second)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), logits(family.model(torch.float64)))
        torch.testing.assert_close(logits(model), second)
        model.set_adapter("default")
        torch.testing.assert_close(logits(model), first)

    def test_are_added_by_transformers_itself(self, family):
        model = family.model(torch.float64)
        before = logits(model)
        model.add_adapter(LoraConfig(r=2))
        stir(model)
        assert not torch.allclose(logits(model), before)
        model.disable_adapters()
        torch.testing.assert_close(logits(model), before)


CASES = [(name, strategy) for name, family in FAMILIES.items() for strategy in family.strategies]


class TestGenerate:
    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize(("name", "strategy"), CASES)
    def test_writes_what_the_merged_model_writes(self, name, strategy, task):
        model = adapted(FAMILIES[name], task)
        written = [
            model.generate(input_ids=text(2, 4), max_new_tokens=12, seed=3, do_sample=True, **strategy)
            for model in (model, model.merge_and_unload())
        ]
        assert torch.equal(*written)

    def test_an_argument_that_peft_passes_on_is_refused_all_the_same(self, family):
        model = adapted(family, TaskType.CAUSAL_LM)
        with pytest.raises(ValueError, match="`output_attentions` is not supported by .*ForMaskedDiffusion"):
            model(text(), output_attentions=True)
        with pytest.raises(ValueError, match=r"`inputs_embeds` is not supported.*pass `input_ids`"):
            model(text(), inputs_embeds=torch.zeros(2, 9, 32))
        with pytest.raises(ValueError, match="`strategy`"):
            model.generate(input_ids=text(), max_new_tokens=4, strategy="fastest")
