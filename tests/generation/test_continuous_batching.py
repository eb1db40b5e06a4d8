"""transformers' continuous batching on ARMD as a causal language model, against every text on its own."""

import gc

import pytest
import torch
from armd_forms import both_forms
from scipy import stats
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.model_runner import ModelRunner

from hf_diffusion import DiffusionGenerationConfig


NEW = 10
LENGTHS = [3, 21, 1, 10]
ROOMY = {"page_size": 16, "num_blocks": 16, "max_batch_tokens": 128}
CRAMPED = {"page_size": 4, "num_blocks": 10, "max_batch_tokens": 8, "max_requests_per_batch": 3}
"""Room for 40 of 75 tokens, and a pass reads 8: prompts come in pieces, and texts wait or are put off."""


@pytest.fixture(scope="module", autouse=True)
def quick_ends():
    """A manager that ends collects garbage; what is there before need not be looked through every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def prompts():
    return [torch.randint(22, (length,)).tolist() for length in LENGTHS]


@pytest.fixture
def causal():
    return both_forms()[1]


def batching(room=ROOMY, **settings):
    return ContinuousBatchingConfig(**{**room, **settings})


def alone(causal, prompt, **settings):
    """What `generate` writes after `prompt` when nothing else is written."""
    return causal.generate(torch.tensor([prompt]), **{"max_new_tokens": NEW, **settings})[0, len(prompt) :].tolist()


def written(outputs):
    assert all(output.error is None for output in outputs.values())
    return [output.generated_tokens for output in outputs.values()]


def count_tokens(causal, tokens):
    """Append to `tokens` how many of them each pass reads."""
    causal.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].numel()))


class TestGreedy:
    @pytest.mark.parametrize(
        ("name", "room", "implementation"),
        [
            pytest.param("armd", ROOMY, "sdpa", id="armd-roomy-sdpa"),
            pytest.param("armd", CRAMPED, "eager", id="armd-cramped-eager"),
            pytest.param("armd_left_neighbour", ROOMY, "eager", id="left-roomy-eager"),
            pytest.param("armd_left_neighbour", CRAMPED, "sdpa", id="left-cramped-sdpa"),
        ],
    )
    def test_every_text_is_what_it_would_be_alone(self, prompts, name, room, implementation):
        masked_diffusion, causal = both_forms(name)
        causal.set_attn_implementation(implementation)
        expected = [alone(causal, prompt) for prompt in prompts]
        padded = torch.tensor([[0] * (21 - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (21 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        by_strategy = masked_diffusion.generate(
            padded, attention_mask=mask, strategy="autoregressive", do_sample=False, max_new_tokens=NEW
        )
        tokens = []
        count_tokens(causal, tokens)
        outputs = causal.generate_batch(prompts, max_new_tokens=NEW, continuous_batching_config=batching(room))
        assert written(outputs) == expected == by_strategy[:, 21:].tolist()
        assert [output.prompt_ids for output in outputs.values()] == prompts
        assert max(tokens) <= room["max_batch_tokens"]
        if room == CRAMPED:  # some were put off, and read again what they had written
            assert sum(tokens) > sum(LENGTHS) + len(LENGTHS) * (NEW - 1)

    @pytest.mark.parametrize(
        ("name", "form", "is_padded"),
        [
            ("armd", "sinusoidal", False),
            ("armd", "learned", True),
            ("armd_left_neighbour", "learned", False),
            ("armd_left_neighbour", "sinusoidal", True),
        ],
    )
    @torch.no_grad()
    def test_logits_are_those_of_the_ordinary_forward(self, prompts, name, form, is_padded, monkeypatch):
        if is_padded:  # as for CUDA graphs, and for what is compiled
            monkeypatch.setattr(ModelRunner, "pad_inputs", property(lambda _: True, lambda *_: None), raising=False)
        causal = both_forms(name, prefix_encoding=form)[1]
        rows = []
        hook = causal.lm_head.register_forward_hook(lambda _, __, logits: rows.append(logits[0]))
        room = batching(CRAMPED, q_padding_interval_size=3, kv_padding_interval_size=7)
        outputs = causal.generate_batch(prompts, max_new_tokens=NEW, warmup=False, continuous_batching_config=room)
        hook.remove()
        rows = torch.cat(rows)
        for prompt, tokens in zip(prompts, written(outputs), strict=True):
            logits = causal(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            difference = torch.cdist(logits, rows, p=torch.inf).amin(dim=1)
            assert float(difference.max()) < 1e-10

    def test_a_text_ends_with_a_token_that_ends_it(self, prompts, causal):
        causal.generation_config.eos_token_id = [3, 5, 7, 11]
        outputs = written(causal.generate_batch(prompts, max_new_tokens=24, continuous_batching_config=batching()))
        assert outputs == [alone(causal, prompt, max_new_tokens=24) for prompt in prompts]
        assert min(map(len, outputs)) < 24

    def test_without_a_limit_a_text_fills_the_context(self):
        causal = both_forms(max_position_embeddings=16)[1]
        (tokens,) = written(causal.generate_batch([[1, 2, 3]], continuous_batching_config=batching()))
        assert tokens == alone(causal, [1, 2, 3], max_new_tokens=13)

    @pytest.mark.parametrize("allow_block_sharing", [True, False])
    def test_texts_with_one_beginning_share_it(self, causal, allow_block_sharing):
        beginning = torch.randint(22, (16,)).tolist()
        prompts = [[*beginning, *ending] for ending in ([1, 2], [3], [4, 5, 6])]
        expected = [alone(causal, prompt) for prompt in prompts]
        room = batching(CRAMPED, max_batch_tokens=24, num_blocks=40, allow_block_sharing=allow_block_sharing)
        tokens = []
        count_tokens(causal, tokens)
        assert written(causal.generate_batch(prompts, max_new_tokens=NEW, continuous_batching_config=room)) == expected
        everything = sum(map(len, prompts)) + len(prompts) * (NEW - 1)
        assert (sum(tokens) < everything) == allow_block_sharing

    @pytest.mark.parametrize("where", ["call", "config", "model"])
    def test_through_generate(self, causal, where):
        ids = torch.randint(22, (3, 7))
        expected = causal.generate(ids, max_new_tokens=NEW)
        settings = {"cache_implementation": "paged", "max_new_tokens": NEW}
        arguments = {"continuous_batching_config": batching(), "attention_mask": torch.ones_like(ids)}
        if where == "call":
            arguments.update(settings)
        elif where == "config":
            arguments["generation_config"] = GenerationConfig(**settings)
        else:
            causal.generation_config.update(**settings)
        # The first dimension is transformers' own.
        assert torch.equal(causal.generate(input_ids=ids, **arguments), expected[None])

    def test_without_a_strategy_that_the_model_has(self, causal):
        causal.generation_config.update(strategy="strided", num_streams=3, allow_custom_entries=True)
        settings = {"strategy": None, "max_new_tokens": NEW, "continuous_batching_config": batching()}
        expected = alone(causal, [1, 2, 3], strategy=None)
        assert written(causal.generate_batch([[1, 2, 3]], **settings)) == [expected]
        ids = torch.tensor([[1, 2, 3]])
        assert causal.generate(ids, cache_implementation="paged", **settings).tolist() == [[[1, 2, 3, *expected]]]


class TestSampling:
    def test_log_probabilities_are_those_of_the_tokens(self, prompts, causal):
        outputs = causal.generate_batch(
            prompts,
            do_sample=True,
            temperature=0.7,
            max_new_tokens=NEW,
            continuous_batching_config=batching(CRAMPED, return_logprobs=True),
        )
        for output in outputs.values():
            text = torch.tensor([output.prompt_ids + output.generated_tokens])
            log_probs = (causal(text).logits[0, :-1] / 0.7).log_softmax(-1).gather(-1, text[0, 1:, None])[:, 0]
            expected = log_probs[len(output.prompt_ids) - 1 :].float()
            torch.testing.assert_close(torch.tensor(output.logprobs), expected, rtol=1e-5, atol=1e-5)

    def test_a_seed_gives_one_text_again(self, causal):
        def draw(seed):
            room = batching(seed=seed)
            (tokens,) = written(
                causal.generate_batch([[1, 2]], do_sample=True, max_new_tokens=NEW, continuous_batching_config=room)
            )
            return tokens

        assert draw(3) == draw(3) != draw(4)

    def test_several_texts_for_a_prompt_have_the_law_of_the_model(self):
        masked_diffusion, causal = both_forms(vocab_size=3, max_position_embeddings=4)
        texts = torch.tensor([[2, 0, first, second] for first in range(3) for second in range(3)])
        log_probs = masked_diffusion(texts).logits.log_softmax(-1).gather(-1, texts[..., None])[:, 2:, 0]
        draws = 300
        outputs = causal.generate_batch(
            [[2, 0]],
            do_sample=True,
            max_new_tokens=2,
            num_return_sequences=draws,
            continuous_batching_config=batching(page_size=4, num_blocks=draws, max_batch_tokens=draws, seed=1),
        )
        assert len(outputs) == draws
        counts = torch.bincount((torch.tensor(written(outputs)) * torch.tensor([3, 1])).sum(-1), minlength=9).double()
        expected = log_probs.sum(-1).exp().detach() * draws
        often = expected >= 5
        observed = torch.cat([counts[often], counts[~often].sum()[None]])
        wanted = torch.cat([expected[often], expected[~often].sum()[None]])
        assert stats.chisquare(observed, wanted).pvalue > 1e-3

    @pytest.mark.parametrize("allow_block_sharing", [True, False])
    def test_copies_of_a_text_read_what_it_has_read(self, causal, prompts, allow_block_sharing):
        room = batching(page_size=4, num_blocks=80, allow_block_sharing=allow_block_sharing)
        outputs = causal.generate_batch(
            prompts[:2],
            do_sample=True,
            top_k=1,
            num_return_sequences=2,
            max_new_tokens=NEW,
            continuous_batching_config=room,
        )
        assert written(outputs) == [alone(causal, prompt) for prompt in prompts[:2] for _ in range(2)]


class TestSessions:
    def test_texts_come_while_others_are_written_and_are_shown_as_they_grow(self, prompts, causal):
        expected = [alone(causal, prompt) for prompt in prompts]
        manager = causal.init_continuous_batching(continuous_batching_config=batching(CRAMPED))
        manager.start()
        try:
            name = manager.add_request(prompts[0], max_new_tokens=NEW, streaming=True)
            shown = []
            for output in manager.request_id_iter(name):
                if not shown:
                    manager.add_requests(prompts[1:], max_new_tokens=NEW)
                shown.append(output.generated_tokens)
            assert shown == [expected[0][: number + 1] for number in range(NEW)]
            late = [manager.get_result(timeout=30) for _ in prompts[1:]]
        finally:
            manager.stop()
        assert {tuple(output.prompt_ids): output.generated_tokens for output in late} == {
            tuple(prompt): tokens for prompt, tokens in zip(prompts[1:], expected[1:], strict=True)
        }

    def test_the_model_is_as_it_was_within_and_after(self, prompts, causal):
        expected, implementation = alone(causal, prompts[0]), causal.config._attn_implementation
        config = GenerationConfig(max_new_tokens=NEW)
        with causal.continuous_batching_context_manager(config, continuous_batching_config=batching()) as manager:
            manager.add_request(prompts[0])
            assert alone(causal, prompts[0]) == expected == manager.get_result(timeout=30).generated_tokens
        assert causal.config._attn_implementation == implementation
        assert config.eos_token_id is None and causal.generation_config.eos_token_id is None

    def test_a_manager_may_be_kept(self, prompts, causal):
        settings = {"max_new_tokens": NEW, "continuous_batching_config": batching(), "persistent_manager": True}
        expected = [alone(causal, prompt) for prompt in prompts]
        assert written(causal.generate_batch(prompts[:3], **settings)) == expected[:3]
        manager = causal.init_continuous_batching()
        assert written(causal.generate_batch(prompts[3:], **settings)) == expected[3:]
        assert causal.init_continuous_batching() is manager
        with pytest.raises(ValueError, match="`do_sample`=True.*`destroy_cached_continuous_batching_manager`"):
            causal.generate_batch(prompts, do_sample=True, **settings)
        causal.destroy_cached_continuous_batching_manager()
        assert causal.init_continuous_batching() is not manager


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"inputs": [[1], []]}, "`input_ids` of a request is empty"),
            ({"inputs": [[1], [23]]}, "`mask_token_id` .23., and a causal language model fills no gaps"),
            ({"inputs": [[1], [24]]}, "the token id 24, outside the vocabulary"),
            ({"inputs": [[1], [0] * 60]}, "a text of 65 tokens, more than the model's context"),
            ({"do_sample": True, "num_return_sequences": 2}, "`num_return_sequences`=2 with a prompt of one token"),
            ({"num_beans": 4}, "`num_beans` is not an argument.*`num_beams`"),
            ({"num_beams": 4}, "`num_beams`=4 has no effect in continuous batching"),
            ({"repetition_penalty": 1.2}, "`repetition_penalty`=1.2 has no effect in continuous batching"),
            ({"max_length": 30}, "`max_length`=30 has no effect in continuous batching"),
            ({"strategy": "strided"}, "`strategy`='strided' has no effect in continuous batching"),
            (
                {"generation_config": DiffusionGenerationConfig(num_streams=2)},
                "`num_streams`=2 has no effect in continuous batching",
            ),
        ],
        ids=lambda value: "" if isinstance(value, str) else "-".join(value),
    )
    def test_before_any_pass(self, causal, arguments, message):
        causal.model.embed_tokens.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made"))
        with pytest.raises(ValueError, match=message):
            causal.generate_batch(**{"inputs": [[1]], "max_new_tokens": 5, **arguments})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"attention_mask": torch.tensor([[0, 1], [1, 1]])}, "`attention_mask` marks padding"),
            ({"logits_processor": [lambda ids, scores: scores]}, "`logits_processor` has no effect"),
            ({"max_new_tokens": None}, "Set `max_new_tokens`"),
            ({"num_return_sequences": 2}, "`num_return_sequences`.*`generate_batch`"),
            ({"eos_token_id": 3}, "`eos_token_id` for several prompts. Pass them to `generate_batch`"),
            ({"num_beams": 2}, "`num_beams`=2 has no effect"),
        ],
        ids=lambda value: "" if isinstance(value, str) else "-".join(value),
    )
    def test_what_generate_would_pass_over(self, causal, arguments, message):
        with pytest.raises(ValueError, match=message):
            causal.generate(
                torch.ones(2, 2, dtype=torch.long),
                **{"max_new_tokens": 5, "cache_implementation": "paged", **arguments},
            )

    def test_a_request_is_checked_when_it_is_made(self, causal):
        with causal.continuous_batching_context_manager(continuous_batching_config=batching()) as manager:
            with pytest.raises(ValueError, match="a text of 65 tokens"):
                manager.add_request([1, 2], max_new_tokens=63)
            with pytest.raises(ValueError, match="the token id -1, outside the vocabulary"):
                manager.add_requests([[1, 2], [-1]], max_new_tokens=6)

    def test_other_implementations_of_attention(self, causal):
        causal.set_attn_implementation("flex_attention")
        with pytest.raises(ValueError, match="`attn_implementation`='flex_attention'.*Load the model with 'sdpa'"):
            causal.generate_batch([[1]], max_new_tokens=2)

    @pytest.mark.filterwarnings("ignore:Passing ContinuousBatchingConfig through GenerationConfig")
    def test_a_batching_config_of_another_kind(self, causal):
        with pytest.raises(ValueError, match="`continuous_batching_config` must be a `ContinuousBatchingConfig`"):
            causal.init_continuous_batching(GenerationConfig(continuous_batching_config={"num_blocks": 2}))

    def test_the_other_form_writes_in_any_order(self, causal):
        with pytest.raises(ValueError, match="`generate_batch`.*Pass a padded batch to `generate`"):
            causal.as_masked_diffusion().generate_batch([[1]])
