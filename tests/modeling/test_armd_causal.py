"""ARMD as a causal language model: its numbers are those of the left-to-right order, with any cache of tokens."""

import pytest
import torch
from armd_forms import both_forms, left_padded
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from hf_diffusion import ARMDCache, ARMDForCausalLM, ARMDForMaskedDiffusion


LENGTH = 10
NAMES = ["armd", "armd_left_neighbour"]


@pytest.fixture
def ids():
    return torch.randint(22, (3, LENGTH))


@pytest.fixture
def causal():
    return both_forms()[1]


class TestNumbers:
    @pytest.mark.parametrize("form", ["sinusoidal", "learned"])
    @pytest.mark.parametrize("name", NAMES)
    @torch.no_grad()
    def test_row_n_predicts_what_row_n_plus_one_of_the_masked_diffusion_model_does(self, name, form):
        masked_diffusion, causal = both_forms(name, prefix_encoding=form)
        ids = torch.randint(22, (2, 150 if form == "sinusoidal" else 40))
        if form == "sinusoidal":  # longer than a chunk of the prefix aggregation
            masked_diffusion.config.max_position_embeddings = causal.config.max_position_embeddings = 160
        logits, expected = causal(ids).logits, masked_diffusion(ids).logits
        torch.testing.assert_close(logits[:, :-1], expected[:, 1:], rtol=0, atol=1e-10)

    @pytest.mark.parametrize("num_two_stream_layers", [1, 4])
    def test_however_many_layers_have_two_streams(self, ids, num_two_stream_layers):
        masked_diffusion, causal = both_forms(num_two_stream_layers=num_two_stream_layers)
        torch.testing.assert_close(causal(ids).logits[:, :-1], masked_diffusion(ids).logits[:, 1:], rtol=0, atol=1e-10)

    @pytest.mark.parametrize("kept", [range(3, 12), range(9), [0, 1, 4, 5, 6, 7, 9, 10, 11]], ids=str)
    @pytest.mark.parametrize("name", NAMES)
    def test_padding_changes_nothing(self, name, kept):
        _, causal = both_forms(name)
        ids, kept = torch.randint(22, (2, 12)), list(kept)
        mask = torch.ones_like(ids)
        mask[0] = 0
        mask[0, kept] = 1
        padded = ids.masked_fill(mask == 0, 1234)
        logits = causal(padded, attention_mask=mask).logits
        torch.testing.assert_close(logits[0, kept], causal(ids[:1, kept]).logits[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(logits[1], causal(ids[1:]).logits[0], rtol=0, atol=1e-10)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_last_row_of_left_padding_predicts_the_first_token(self, name):
        masked_diffusion, causal = both_forms(name)
        ids, mask = left_padded(1, LENGTH, [3])
        first = causal(ids, attention_mask=mask).logits[0, 2]
        torch.testing.assert_close(first, masked_diffusion(ids[:, 3:]).logits[0, 0], rtol=0, atol=1e-10)

    @pytest.mark.parametrize("form", ["sinusoidal", "learned"])
    def test_a_full_context_has_a_last_row_and_no_token_after_it(self, form):
        _, causal = both_forms(prefix_encoding=form)
        full = causal(torch.randint(22, (1, 64)))
        assert bool(full.logits.isfinite().all())
        message = "65 tokens, more than the model's context .`max_position_embeddings`=64."
        with pytest.raises(ValueError, match=message):
            causal(torch.zeros(1, 65, dtype=torch.long))
        with pytest.raises(ValueError, match=message):
            causal(torch.zeros(1, 1, dtype=torch.long), past_key_values=full.past_key_values)
        padded = torch.ones(1, 66, dtype=torch.long)
        padded[0, :2] = 0
        causal(torch.zeros_like(padded), attention_mask=padded)

    def test_embeddings_in_place_of_tokens(self, causal, ids):
        mask = left_padded(3, LENGTH, [2, 0, 1])[1]
        embeddings = causal.get_input_embeddings()(ids)
        expected = causal(ids, attention_mask=mask).logits[mask == 1]
        given = causal(inputs_embeds=embeddings, attention_mask=mask).logits[mask == 1]
        torch.testing.assert_close(given, expected)

    def test_logits_of_some_rows(self, causal, ids):
        logits = causal(ids).logits
        torch.testing.assert_close(causal(ids, logits_to_keep=3).logits, logits[:, -3:])
        torch.testing.assert_close(causal(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])

    def test_hidden_states_are_those_of_the_rows_that_predict(self, ids):
        masked_diffusion, causal = both_forms()
        expected = masked_diffusion(ids, output_hidden_states=True).hidden_states
        output = causal(ids, output_hidden_states=True)
        assert [states.shape for states in output.hidden_states] == [(3, LENGTH, 32)] * 5
        for states, others in zip(output.hidden_states, expected, strict=True):
            torch.testing.assert_close(states[:, :-1], others[:, 1:], rtol=0, atol=1e-10)
        torch.testing.assert_close(causal.lm_head(output.hidden_states[-1]), output.logits)
        assert causal(ids).hidden_states is None
        assert causal(ids, return_dict=False)[0].shape == output.logits.shape

    @torch.no_grad()
    def test_eager_attention_agrees_with_sdpa(self):
        _, causal = both_forms(dtype=torch.float32)
        ids, mask = left_padded(2, 15, [0, 4])
        expected = causal(ids, attention_mask=mask).logits
        causal.set_attn_implementation("eager")
        cache = StaticCache(causal.config, max_cache_len=19)
        parts = [
            causal(part, attention_mask=mask[:, :end], past_key_values=cache).logits
            for part, end in zip(ids.split([11, 4], dim=1), (11, 15), strict=True)
        ]
        for logits in (causal(ids, attention_mask=mask).logits, torch.cat(parts, dim=1)):
            assert float((logits - expected)[mask == 1].abs().max()) < 1e-5 * float(expected.std())


class TestLoss:
    def test_is_the_cross_entropy_of_the_next_token_in_nats(self, causal, ids):
        labels = ids.clone()
        labels[0, :4] = -100
        logits = causal(ids).logits
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        output = causal(ids, labels=labels)
        torch.testing.assert_close(output.loss, expected)
        assert output.logits is None
        num_labels = int((labels[:, 1:] != -100).sum())
        torch.testing.assert_close(causal(ids, labels=labels, num_items_in_batch=2 * num_labels).loss, expected / 2)

    def test_is_that_of_the_left_to_right_order_but_for_the_first_token(self, ids):
        masked_diffusion, causal = both_forms()
        labels = ids.clone()
        labels[:, 0] = -100
        torch.testing.assert_close(causal(ids, labels=ids).loss, masked_diffusion(ids, labels=labels).loss)

    def test_padding_is_never_predicted(self, causal, ids):
        padded, mask = F.pad(ids, (0, 3), value=9), F.pad(torch.ones_like(ids), (0, 3))
        torch.testing.assert_close(causal(padded, mask, labels=padded).loss, causal(ids, labels=ids).loss)

    def test_gradient_checkpointing_changes_nothing(self, ids):
        gradients = []
        for checkpointing in (False, True):
            causal = both_forms("armd")[1].train()
            if checkpointing:
                causal.gradient_checkpointing_enable()
            causal(ids, labels=ids).loss.backward()
            gradients.append([weight.grad for weight in causal.parameters()])
        torch.testing.assert_close(*gradients)
        with pytest.raises(ValueError, match="a cache is written once"):
            causal(ids, use_cache=True)

    def test_reaches_adapters_which_both_ways_of_writing_read(self, ids):
        _, causal = both_forms(dtype=torch.float32)
        before = causal.generate(ids, max_new_tokens=20)
        adapted = get_peft_model(
            causal, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        adapted(ids, labels=ids).loss.backward()
        trained = {name.split(".")[-3] for name, weight in adapted.named_parameters() if weight.grad is not None}
        assert trained == {"lora_A", "lora_B"}
        after = adapted.generate(input_ids=ids, max_new_tokens=20)
        assert not torch.equal(after, before)
        arguments = {"max_new_tokens": 20, "strategy": "autoregressive", "do_sample": False}
        assert torch.equal(adapted.generate(input_ids=ids, **arguments), after)

    def test_trainer_lowers_it(self, tmp_path):
        causal, text = both_forms(dtype=torch.float32)[1], torch.randint(22, (12,))
        arguments = {"max_steps": 20, "learning_rate": 3e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        trainer = Trainer(
            model=causal,
            args=TrainingArguments(output_dir=str(tmp_path), **arguments),
            train_dataset=[{"input_ids": text, "labels": text}] * 64,
        )
        before = trainer.evaluate([{"input_ids": text, "labels": text}])["eval_loss"]
        trainer.train()
        assert trainer.evaluate([{"input_ids": text, "labels": text}])["eval_loss"] < 0.5 * before


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "lazy": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config, max_cache_len=LENGTH + 5),
}


@pytest.mark.parametrize("kind", CACHES)
class TestCache:
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("name", NAMES)
    @torch.no_grad()
    def test_cached_logits_are_those_of_one_pass(self, name, kind, padded):
        _, causal = both_forms(name, prefix_encoding="learned")
        ids, mask = left_padded(3, LENGTH, [0, 3, 1] if padded else [0, 0, 0])
        expected, cache = causal(ids, attention_mask=mask).logits, CACHES[kind](causal.config)
        end, parts = 0, []
        for part in ids.split([2, 1, 1, 4, 2], dim=1):  # the second row begins after the first pass
            end += part.shape[1]
            parts.append(causal(part, attention_mask=mask[:, :end], past_key_values=cache).logits)
            assert int(cache.get_seq_length()) == end
        difference = (torch.cat(parts, dim=1) - expected)[mask == 1]
        assert float(difference.abs().max()) < 1e-10

    @torch.no_grad()
    def test_a_cache_with_more_room_than_the_context(self, ids, kind):
        _, causal = both_forms(prefix_encoding="learned", max_position_embeddings=LENGTH)
        mask = left_padded(3, LENGTH, [0, 3, 1])[1].bool()
        for attention_mask in (None, mask):
            expected, cache = causal(ids, attention_mask=attention_mask).logits, CACHES[kind](causal.config)
            causal(ids[:, :4], attention_mask=None if attention_mask is None else mask[:, :4], past_key_values=cache)
            logits = causal(ids[:, 4:], attention_mask=attention_mask, past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, 4:], rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_rows_can_be_reordered(self, causal, ids, kind):
        cache = CACHES[kind](causal.config)
        causal(ids[:, :6], past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        ids = ids[[2, 2, 0]]
        logits = causal(ids[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(logits, causal(ids).logits[:, 6:], rtol=0, atol=1e-10)

    def test_a_cache_that_is_reset_is_empty(self, causal, ids, kind):
        cache = CACHES[kind](causal.config)
        with torch.no_grad():
            causal(ids.flip(1), past_key_values=cache)
            cache.reset()
            causal(ids[:, :6], past_key_values=cache)
            logits = causal(ids[:, 6:], past_key_values=cache).logits
            torch.testing.assert_close(logits, causal(ids).logits[:, 6:], rtol=0, atol=1e-10)


@pytest.mark.slow
@torch.no_grad()
def test_decoding_into_a_static_cache_compiles_to_one_graph(causal, ids):
    expected, cache = causal(ids).logits, StaticCache(causal.config, max_cache_len=LENGTH)
    causal(ids[:, :4], past_key_values=cache)
    compiled = torch.compile(causal, backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    logits = [compiled(ids[:, [position]], past_key_values=cache).logits for position in range(4, LENGTH)]
    # Rotary angles are float32, and rounded otherwise.
    torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, 4:], rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class TestOneEntryForEachToken:
    @torch.no_grad()
    def test_can_be_cropped_repeated_and_selected(self, causal, ids):
        expected = causal(ids).logits
        cache = causal(ids).past_key_values
        cache.crop(-4)
        again = causal(ids[:, 6:8], past_key_values=cache).logits
        torch.testing.assert_close(again, expected[:, 6:8], rtol=0, atol=1e-10)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 5]))
        last = causal(ids[[0, 2], 8:], past_key_values=cache).logits
        torch.testing.assert_close(last, expected[[0, 2], 8:], rtol=0, atol=1e-10)

    def test_all_layers_hold_as_many_as_there_are_tokens(self, causal, ids):
        cache = causal(ids).past_key_values
        assert isinstance(cache, DynamicCache)
        assert [layer.keys.shape for layer in cache.layers] == [(3, 4, LENGTH, 8)] * 4
        assert [layer.values.shape for layer in cache.layers] == [(3, 4, LENGTH, 16)] + [(3, 4, LENGTH, 8)] * 3

    def test_there_is_none_where_none_is_wanted(self, causal, ids):
        assert causal(ids, use_cache=False).past_key_values is None
        causal.config.use_cache = False
        assert causal(ids).past_key_values is None
        causal.config.use_cache = True
        assert causal.train()(ids).past_key_values is None


def early_initialized(config):
    cache = StaticCache(config, max_cache_len=20)
    cache.early_initialization(batch_size=3, num_heads=4, head_dim=8, dtype=torch.float64, device="cpu")
    return cache


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"input_ids": None}, "either `input_ids` or `inputs_embeds`"),
            ({"inputs_embeds": torch.zeros(3, LENGTH, 32)}, "either `input_ids` or `inputs_embeds`"),
            ({"input_ids": torch.zeros(3, 0, dtype=torch.long)}, r"must have shape .batch, length >= 1"),
            ({"input_ids": torch.full((3, LENGTH), 23)}, "a causal language model fills no gaps.*`strategy`"),
            ({"input_ids": torch.full((3, LENGTH), 24)}, "the token id 24, outside the vocabulary"),
            ({"attention_mask": torch.ones(3, LENGTH + 1)}, "`attention_mask` must have shape .batch=3, 10."),
            ({"attention_mask": torch.ones(3, 1, LENGTH, LENGTH)}, "marks padding and says nothing else"),
            ({"labels": torch.zeros(3, 3, dtype=torch.long)}, "`labels` must have the shape of `input_ids`"),
            ({"labels": torch.full((3, LENGTH), 23)}, "`labels` holds 23"),
            ({"labels": torch.zeros(3, LENGTH, dtype=torch.long), "logits_to_keep": 1}, "`logits_to_keep` has no"),
            ({"output_attentions": True}, "`output_attentions`=True: two streams"),
        ],
        ids=lambda value: "" if isinstance(value, str) else "-".join(value),
    )
    def test_is_refused(self, causal, ids, arguments, message):
        with pytest.raises(ValueError, match=message):
            causal(**{"input_ids": ids, **arguments})

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda config: ARMDCache(4), "ARMDCache"),
            (lambda config: (), "must be a `Cache` of transformers, got tuple"),
            (
                lambda config: Cache(layers=[DynamicSlidingWindowLayer(4) for _ in range(4)]),
                "DynamicSlidingWindowLayer",
            ),
            (lambda config: Cache(layer_class_to_replicate=DynamicSlidingWindowLayer), "DynamicSlidingWindowLayer"),
            (early_initialized, "values of width 8 in its first layer.*of width 16"),
            (lambda config: StaticCache(config, max_cache_len=4), None),
        ],
        ids=["armd", "tuple", "sliding", "lazy", "early", "short"],
    )
    def test_caches_that_keep_less_than_is_read_are_refused(self, causal, ids, make, message):
        cache = make(causal.config)
        if message is None:
            causal(ids[:, :3], past_key_values=cache)
            message = "has room for 4 tokens, and holds 3 before this pass of 7"
        with pytest.raises(ValueError, match=message):
            causal(ids[:, 3:], past_key_values=cache)


class TestLoading:
    @pytest.mark.parametrize("tied", [True, False])
    @torch.no_grad()
    def test_one_folder_loads_in_either_form(self, ids, tied, tmp_path):
        forms = both_forms(dtype=torch.float32, tie_word_embeddings=tied)
        expected = forms[1](ids).logits
        for number, model in enumerate(forms):
            folder = tmp_path / str(number)
            model.save_pretrained(folder)
            masked_diffusion = AutoModelForMaskedLM.from_pretrained(folder)
            causal, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not any(info.values())
            assert (type(masked_diffusion), type(causal)) == (ARMDForMaskedDiffusion, ARMDForCausalLM)
            assert (causal.lm_head.weight is causal.get_input_embeddings().weight) == tied
            torch.testing.assert_close(causal(ids).logits, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(masked_diffusion(ids).logits[:, 1:], expected[:, :-1], rtol=1e-4, atol=1e-4)

    def test_the_masked_diffusion_form_shares_every_weight(self, causal, ids):
        view = causal.as_masked_diffusion()
        weights = dict(view.named_parameters())
        assert weights.keys() == dict(causal.named_parameters()).keys()
        assert all(weights[name] is weight for name, weight in causal.named_parameters())
        torch.testing.assert_close(view(ids).logits[:, 1:], causal(ids).logits[:, :-1])
