"""transformers' own `generate` on ARMD as a causal language model, and the way from there to the strategies."""

import itertools

import pytest
import torch
from armd_forms import both_forms, left_padded
from scipy import stats
from transformers import GenerationConfig, StaticCache

from hf_diffusion import DiffusionGenerationConfig


NEW = 12


@pytest.fixture
def ids():
    return torch.randint(22, (2, 7))


@pytest.fixture
def causal():
    return both_forms()[1]


def seeded():
    return torch.Generator().manual_seed(3)


class TestGreedy:
    @pytest.mark.parametrize("name", ["armd", "armd_left_neighbour"])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_is_the_autoregressive_strategy_taking_the_most_likely_token(self, name, use_cache):
        masked_diffusion, causal = both_forms(name)
        ids, mask = left_padded(6, 8, [0, 5, 2, 7, 1, 3])
        arguments = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": [3, 5, 7, 11], "pad_token_id": 9}
        expected = masked_diffusion.generate(ids, strategy="autoregressive", do_sample=False, **arguments)
        output = causal.generate(ids, use_cache=use_cache, **arguments)
        assert bool((output[:, 8:] == 9).any()), "no text has ended early"
        # transformers stops where every text has ended; the strategy returns the length that was asked for.
        assert torch.equal(output, expected[:, : output.shape[1]])
        assert bool((expected[:, output.shape[1] :] == 9).all())

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize(
        "settings",
        [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"num_beams": 1, "output_scores": True}],
        ids=str,
    )
    def test_is_the_same_by_every_way_to_keep_the_past(self, causal, padded, settings):
        ids, mask = left_padded(2, 8, [0, 5] if padded else [0, 0])
        expected = causal.generate(ids, attention_mask=mask, max_new_tokens=NEW)
        assert torch.equal(causal.generate(ids, attention_mask=mask, max_new_tokens=NEW, **settings), expected)

    def test_prefill_in_chunks_into_a_static_cache(self, causal, ids):
        settings = {"cache_implementation": "static", "prefill_chunk_size": 3}
        expected = causal.generate(ids, max_new_tokens=NEW)
        assert torch.equal(causal.generate(ids, max_new_tokens=NEW, **settings), expected)

    def test_goes_on_from_a_returned_cache(self, causal, ids):
        mask = left_padded(2, 7, [2, 0])[1]
        whole = causal.generate(ids, attention_mask=mask, max_new_tokens=NEW)
        first = causal.generate(ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True)
        mask = torch.nn.functional.pad(mask, (0, 5), value=1)
        rest = causal.generate(
            first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=NEW - 5
        )
        assert torch.equal(rest, whole)

    def test_starts_from_embeddings(self, causal, ids):
        mask = left_padded(2, 7, [2, 0])[1]
        embeddings = causal.get_input_embeddings()(ids)
        expected = causal.generate(ids, attention_mask=mask, max_new_tokens=NEW)[:, 7:]
        for settings in ({}, {"cache_implementation": "static"}, {"input_ids": ids}):
            drawn = causal.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=NEW, **settings)
            assert torch.equal(drawn[:, -NEW:], expected)

    def test_returns_what_it_saw_on_the_way(self, causal, ids):
        output = causal.generate(
            ids,
            max_new_tokens=NEW,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            output_hidden_states=True,
        )
        logits = causal(output.sequences).logits[:, 6:-1]
        torch.testing.assert_close(torch.stack(output.logits, dim=1), logits.float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.stack(output.scores), torch.stack(output.logits))
        assert output.past_key_values.get_seq_length() == 7 + NEW - 1
        lengths = [[states.shape for states in of_pass] for of_pass in output.hidden_states]
        assert lengths == [[(2, 7, 32)] * 5] + [[(2, 1, 32)] * 5] * (NEW - 1)


class TestOtherSearches:
    def test_sampling_has_the_law_of_the_strategy(self):
        masked_diffusion, causal = both_forms(vocab_size=3, max_position_embeddings=4)
        prompt, draws = torch.tensor([[2]]), 5_000
        texts = torch.tensor([[2, *rest] for rest in itertools.product(range(3), repeat=3)])
        log_probs = masked_diffusion(texts).logits.log_softmax(-1).gather(-1, texts[..., None])[:, 1:, 0]
        expected = log_probs.sum(-1).exp().detach() * draws
        drawn = causal.generate(prompt, do_sample=True, top_k=0, max_new_tokens=3, num_return_sequences=draws)
        counts = torch.bincount((drawn[:, 1:] * torch.tensor([9, 3, 1])).sum(-1), minlength=27).double()
        often = expected >= 5
        observed = torch.cat([counts[often], counts[~often].sum()[None]])
        wanted = torch.cat([expected[often], expected[~often].sum()[None]])
        assert stats.chisquare(observed, wanted).pvalue > 1e-3

    @pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
    def test_beam_search_wide_enough_finds_the_most_likely_texts(self, settings):
        masked_diffusion, causal = both_forms(vocab_size=4)
        prompt, mask = torch.tensor([[1, 3, 2, 0], [0, 0, 2, 1]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        output = causal.generate(
            prompt,
            attention_mask=mask,
            num_beams=16,  # all texts of two new tokens: the third is exhaustive
            num_return_sequences=16,
            max_new_tokens=3,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        endings = torch.tensor(list(itertools.product(range(4), repeat=3)))
        for row, (given, real) in enumerate(zip(prompt, mask, strict=True)):
            given = given[real == 1]
            texts = torch.cat([given.expand(64, -1), endings], dim=1)
            log_probs = masked_diffusion(texts).logits.log_softmax(-1).gather(-1, texts[..., None])[..., 0]
            scores, best = log_probs[:, len(given) :].sum(-1).topk(16)
            found = slice(16 * row, 16 * (row + 1))
            assert torch.equal(output.sequences[found, 4:], endings[best])
            torch.testing.assert_close(output.sequences_scores[found], scores.float(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "assistance",
        [{"assistant": 2}, {"assistant": 4}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 3}],
        ids=str,
    )
    @pytest.mark.parametrize("eos_token_id", [None, [3, 5, 7, 11]])
    def test_assisted_decoding_is_greedy_decoding_in_fewer_passes(self, causal, assistance, eos_token_id):
        arguments = {"max_new_tokens": 24, "eos_token_id": eos_token_id, "pad_token_id": 9}
        ids = torch.tensor([[4, 8, 15, 16, 4, 8, 15]])
        expected = causal.generate(ids, **arguments)
        passes = []
        causal.register_forward_pre_hook(lambda _, __: passes.append(1))
        if "assistant" in assistance:
            assistance = {"assistant_model": both_forms(num_hidden_layers=assistance["assistant"])[1]}
            if assistance["assistant_model"].config.num_hidden_layers == 4:
                assistance["assistant_model"].load_state_dict(causal.state_dict())
            # A setting of the assistant's own does not make it write in another order.
            assistance["assistant_model"].generation_config.strategy = "strided"
        assert torch.equal(causal.generate(ids, **arguments, **assistance), expected)
        num_new = expected.shape[1] - 7
        if "assistant_model" in assistance and assistance["assistant_model"].config.num_hidden_layers == 4:
            assert len(passes) < num_new

    def test_several_sequences_for_a_prompt(self, causal, ids):
        drawn = causal.generate(ids, do_sample=True, top_k=0, max_new_tokens=NEW, num_return_sequences=3)
        assert torch.equal(drawn[:, :7], ids.repeat_interleave(3, dim=0))
        assert not torch.equal(drawn[0], drawn[1])


class TestWayToTheStrategies:
    STRIDED = {"strategy": "strided", "num_streams": 3}

    @pytest.mark.parametrize("where", ["call", "config", "model", "plain config"])
    def test_a_strategy_set_anywhere_writes_as_the_masked_diffusion_form_does(self, ids, where):
        masked_diffusion, causal = both_forms()
        mask = left_padded(2, 7, [2, 0])[1]
        arguments = {"attention_mask": mask, "max_new_tokens": NEW}
        expected = masked_diffusion.generate(ids, generator=seeded(), **arguments, **self.STRIDED)
        if where == "call":
            arguments.update(self.STRIDED)
        elif where == "config":
            arguments["generation_config"] = DiffusionGenerationConfig(**self.STRIDED)
        elif where == "plain config":
            arguments["generation_config"] = GenerationConfig(**self.STRIDED)
        else:
            causal.generation_config.update(**self.STRIDED, allow_custom_entries=True)
        assert torch.equal(causal.generate(ids, generator=seeded(), **arguments), expected)

    def test_without_one_the_defaults_are_those_of_transformers(self, causal, ids):
        greedy = causal.generate(ids, max_new_tokens=NEW)
        assert torch.equal(greedy, causal.generate(ids, max_new_tokens=NEW, do_sample=False))
        assert torch.equal(greedy, causal.generate(ids, DiffusionGenerationConfig(max_new_tokens=NEW)))
        causal.generation_config.update(**self.STRIDED, allow_custom_entries=True)
        assert torch.equal(greedy, causal.generate(ids, strategy=None, max_new_tokens=NEW))
        assert torch.equal(causal.generate(ids, max_new_tokens=NEW, strategy=None, num_beams=2)[:, :7], ids)

    def test_gaps_are_filled_with_a_strategy(self, causal, ids):
        masked = ids.clone()
        masked[:, 2:4] = causal.config.mask_token_id
        filled = causal.generate(masked, strategy="autoregressive")
        assert torch.equal(filled[:, [0, 1, 4, 5, 6]], ids[:, [0, 1, 4, 5, 6]])
        with pytest.raises(ValueError, match="fills no gaps. Set `strategy`"):
            causal.generate(masked)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_streams": 4}, "`num_streams`=4 has no effect without a `strategy`"),
            ({"sliding_window": True}, "`sliding_window`=True has no effect without a `strategy`"),
            (
                {"generation_config": DiffusionGenerationConfig(block_length=4)},
                "`block_length`=4 has no effect without",
            ),
            ({"generation_config": GenerationConfig(num_beans=4)}, "`num_beans` is not an argument.*`num_beams`"),
            ({"num_beans": 4}, "num_beans"),
            ({"generator": seeded()}, "generator"),
            ({"position_ids": torch.arange(7)[None]}, "`position_ids` is not an argument.*`attention_mask`"),
            ({"output_attentions": True}, "`output_attentions`=True"),
            ({"strategy": "strided", "num_streams": 3, "num_beams": 2}, "`num_beams`=2 has no effect"),
            ({"max_new_tokens": 58}, "a text of 65 tokens, more than the model's context"),
        ],
        ids=lambda value: "" if isinstance(value, str) else "-".join(value),
    )
    def test_what_has_no_effect_is_refused_before_any_pass(self, causal, ids, arguments, message):
        causal.register_forward_pre_hook(lambda *_: pytest.fail("a pass was made"))
        with pytest.raises(ValueError, match=message):
            causal.generate(ids, **arguments)

    def test_settings_of_a_strategy_that_a_model_keeps_need_one_too(self, causal, ids):
        causal.generation_config.num_streams = 4
        with pytest.raises(ValueError, match="`num_streams`=4 has no effect without a `strategy`"):
            causal.generate(ids)

    def test_padding_does_not_count_as_context(self, causal):
        ids, mask = left_padded(2, 20, [10, 12])
        assert causal.generate(ids, attention_mask=mask, max_new_tokens=54).shape == (2, 74)
        with pytest.raises(ValueError, match="a text of 65 tokens"):
            causal.generate(ids, attention_mask=mask, max_new_tokens=55)

    def test_a_static_cache_of_the_users(self, causal, ids):
        cache = StaticCache(causal.config, max_cache_len=7 + NEW)
        expected = causal.generate(ids, max_new_tokens=NEW)
        assert torch.equal(causal.generate(ids, past_key_values=cache, max_new_tokens=NEW), expected)
