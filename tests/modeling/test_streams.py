"""A causal model in parallel streams: left to right it is the model itself, in other orders it is strictly causal."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_diffusion import CausalStreamsForMaskedDiffusion
from hf_diffusion.conversion import from_causal_lm
from hf_diffusion.diffusion import orders
from hf_diffusion.modeling.rows_streams import NOTHING, plan_rows
from hf_diffusion.modeling.wrapped_attention import wrapped_attention_forward


VOCAB_SIZE = 31
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROTARY = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 8},
    "smollm3": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "olmo2": {"num_key_value_heads": 2},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2},
    "olmo": {"num_key_value_heads": 2},
    "glm4": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {},
}
OTHERS = {
    "gpt2": {"n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "stablelm": {"num_key_value_heads": 2},
}
"""Models that read text on the right as "native" and "hide" say, and not as "wrap" does."""
ALL_MODELS = {**ROTARY, **OTHERS}


LATENT = {
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "head_dim", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "first_k_dense_replace"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **{"moe_intermediate_size": 16, "num_key_value_heads": 4},
}
BART = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **{"d_model": 32, "decoder_ffn_dim": 48, "init_std": 0.3},
}


def causal(name, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **ALL_MODELS[name], **settings})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def text(batch, length):
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(1))


def block_index(ids, given, steps):
    return orders.after_given(torch.cat([-torch.ones(given, dtype=torch.long), steps]).expand_as(ids), ids >= 0)


def mode_of(name):
    return "wrap" if name in ROTARY else "native"


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ALL_MODELS)
class TestEveryModel:
    def test_left_to_right_it_is_the_model_itself(self, name):
        model, ids = causal(name), text(2, 12)
        expected = model(ids).logits
        greedy = model.generate(ids[:, :4], max_new_tokens=9, do_sample=False, pad_token_id=0)
        streams = from_causal_lm(model, later_text=mode_of(name))
        assert torch.equal(streams(ids).logits[:, 1:], expected[:, :-1])
        drawn = streams.generate(ids[:, :4], max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert torch.equal(drawn, greedy)
        assert streams.base_model is model
        assert torch.equal(model(ids).logits, expected)

    @pytest.mark.parametrize("strategy", [{"num_streams": 2}, {"num_streams": 4}], ids=str)
    def test_cached_decoding_is_the_teacher_forced_pass(self, name, strategy):
        streams, ids = from_causal_lm(causal(name, torch.float64), later_text=mode_of(name)), text(2, 4)
        output = streams.generate(
            ids,
            strategy="strided",
            max_new_tokens=10,
            seed=1,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
            **strategy,
        )
        assert output.nfe == strategy["num_streams"] + -(-10 // strategy["num_streams"]) - 1
        blocks = block_index(output.sequences, 4, orders.strided_steps(10, strategy["num_streams"]))
        whole = streams(output.sequences, block_index=blocks).logits[:, 4:]
        torch.testing.assert_close(torch.stack(output.logits, dim=1), whole, rtol=0, atol=1e-10)

    def test_no_token_reads_its_own_block_or_a_later_one(self, name):
        streams, ids = from_causal_lm(causal(name, torch.float64), later_text=mode_of(name)), text(1, 12)
        blocks = block_index(ids, 3, orders.strided_steps(9, 3))
        expected = streams(ids, block_index=blocks).logits[0]
        for block in range(3, int(blocks.max()) + 1):
            changed = torch.where(blocks >= block, (ids + 5) % VOCAB_SIZE, ids)
            logits = streams(changed, block_index=blocks).logits[0]
            until = blocks[0] <= block
            torch.testing.assert_close(logits[until], expected[until], rtol=0, atol=1e-12)
            if block < int(blocks.max()):
                assert (logits[~until] - expected[~until]).abs().max() > 1e-3


def test_text_on_the_right_is_read_as_each_way_says():
    """The last token is known first; a row reads it at its own distance, at that plus the length, or not at all."""
    ids, order = text(1, 8), torch.tensor([[0, 2, 3, 4, 5, 6, 7, 1]])
    logits = {}
    for later_text in ("wrap", "native", "hide"):
        streams = from_causal_lm(causal("llama", torch.float64), later_text=later_text)
        logits[later_text] = streams(ids, block_index=order).logits[0, 2:7]
    hidden = causal("llama", torch.float64)(ids).logits[0, 1:6]
    torch.testing.assert_close(logits["hide"], hidden)
    assert all((logits[name] - hidden).abs().max() > 1e-3 for name in ("wrap", "native"))
    assert (logits["wrap"] - logits["native"]).abs().max() > 1e-3


NO_ROTATION = ("smollm3", {"no_rope_layers": [0]})


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in ROTARY), NO_ROTATION],
    ids=[*ROTARY, "smollm3 without positions"],
)
def test_a_wrapped_distance_is_that_of_a_text_put_in_front(name, settings):
    """In one layer, reading the last token at the distance plus C is reading it C positions earlier."""
    model, ids = causal(name, torch.float64, num_hidden_layers=1, **settings), text(1, 8)
    streams = from_causal_lm(model)
    logits = streams(ids, block_index=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]])).logits[0, 1:7]
    in_front = torch.cat([ids[:, 7:], ids[:, :6]], dim=1)
    positions = torch.tensor([[7, 8, 9, 10, 11, 12, 13]])  # 8, the length, before the first: 7 - 8 = -1 from 0
    expected = model(in_front, position_ids=positions).logits[0, 1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6)  # rotary angles are float32


@pytest.mark.parametrize("name", ROTARY)
def test_rounding_does_not_hide_rotary_positions(name):
    streams = from_causal_lm(causal(name, torch.bfloat16))
    assert streams.config.rotary_layers == [True, True]


def test_layers_without_rotary_positions_are_not_turned_after_saving_either(tmp_path):
    streams = from_causal_lm(causal("smollm3", no_rope_layers=[1, 0]))
    ids, order = text(1, 8), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]])
    assert streams.config.rotary_layers == [True, False]
    expected = streams(ids, block_index=order).logits
    streams.save_pretrained(tmp_path)
    loaded = CausalStreamsForMaskedDiffusion.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids, block_index=order).logits, expected)
    loaded.config.rotary_layers = [True, True]
    assert (loaded(ids, block_index=order).logits - expected).abs().max() > 1e-3


def test_wrapped_distances_need_to_be_known_of(tmp_path):
    from_causal_lm(causal("llama"), later_text="native").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='"wrap"` needs `rotary_layers`.*`conversion.from_causal_lm'):
        CausalStreamsForMaskedDiffusion.from_pretrained(tmp_path, later_text="wrap")


def test_one_causal_model_in_streams_of_two_kinds():
    model, ids, order = causal("llama"), text(1, 8), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]])
    wrapped = from_causal_lm(model)
    expected = wrapped(ids, block_index=order).logits
    hidden = from_causal_lm(model, later_text="hide")
    assert torch.equal(wrapped(ids, block_index=order).logits, expected)
    assert (hidden(ids, block_index=order).logits - expected).abs().max() > 1e-3


def test_another_attention_of_the_causal_model_is_refused():
    streams, ids = from_causal_lm(causal("llama")), text(1, 8)
    expected = streams(ids).logits
    streams.base_model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="`base_model` was switched to 'eager'"):
        streams(ids)
    streams.base_model.set_attn_implementation("causal_streams")
    assert torch.equal(streams(ids).logits, expected)


def test_generation_settings_of_the_causal_model_hold_for_streams_and_come_back_with_it(tmp_path):
    model, prompt = causal("llama"), text(1, 3)
    arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    model.generation_config.update(repetition_penalty=1.5, temperature=0.6)
    end = int(model.generate(prompt, **arguments)[0, 7])
    model.generation_config.eos_token_id = [2, end]
    expected = model.generate(prompt, **arguments)
    assert expected.shape[1] <= 8
    streams = from_causal_lm(model)
    assert streams.generation_config.temperature is None  # nothing is drawn, as far as the model says
    assert torch.equal(streams.generate(prompt, **arguments), expected)
    streams.save_pretrained(tmp_path)
    loaded = CausalStreamsForMaskedDiffusion.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(prompt, **arguments), expected)
    assert torch.equal(loaded.base_model.generate(prompt, **arguments), expected)
    assert loaded.base_model.generation_config.temperature == 0.6


def test_how_the_causal_model_samples_is_how_its_streams_do():
    model = causal("llama")
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=5)
    config = from_causal_lm(model).generation_config
    assert (config.do_sample, config.temperature, config.top_k) == (True, 0.6, 5)


def test_wrapped_attention_is_softmax_over_both_distances():
    torch.manual_seed(0)
    module = causal("llama").model.layers[0].self_attn
    rotary = causal("llama").model.rotary_emb
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)

    def turned(states, positions):
        cos, sin = (part[:, None] for part in rotary(states, torch.tensor([positions])))
        half = torch.cat([-states[..., 4:], states[..., :4]], dim=-1)
        return states * cos + half * sin

    places, key_places, length = [2, 3, 4], [0, 1, 2, 3, 6], 7
    right = torch.tensor([[[[k > q for k in key_places] for q in places]]])
    reads = torch.rand(1, 1, 3, 5) > 0.3
    reads[..., 2] = True
    rotated_query, rotated_key = turned(query, places), turned(key, key_places)
    output, _ = wrapped_attention_forward(
        module,
        rotated_query,
        rotated_key,
        value,
        reads,
        on_the_right=right & reads,
        turn=rotary(query, torch.tensor([[length]])),
        scaling=0.5,
    )
    once_more = turned(query, [place + length for place in places])
    keys, values = (states.repeat_interleave(2, dim=1) for states in (rotated_key, value))
    scores = 0.5 * torch.where(right, once_more @ keys.mT, rotated_query @ keys.mT)
    expected = scores.masked_fill(~reads, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(output.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


class TestRows:
    def plan(self, blocks, **others):
        blocks = torch.tensor([blocks])
        masked = torch.zeros_like(blocks, dtype=torch.bool)
        return plan_rows(masked, None, blocks, others.get("query_positions"), None)

    def test_left_to_right_needs_no_row_but_those_of_the_tokens(self):
        rows = self.plan([0, 1, 2, 3, 4])
        assert rows.plain
        assert rows.token.tolist() == [[0, 1, 2, 3, 4]]
        assert rows.answer.tolist() == [[-1, 0, 1, 2, 3]]

    @pytest.mark.parametrize("seed", range(20))
    def test_every_target_is_answered_by_its_left_neighbour_and_reads_all_earlier_blocks(self, seed):
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randint(4, (9,), generator=generator).unique(return_inverse=True)[1]
        rows = self.plan(blocks.tolist())
        for target in range(1, 9):
            row = int(rows.answer[0, target])
            assert int(rows.token[0, row]) == int(rows.position[0, row]) == target - 1
            assert int(rows.reads_before[0, row]) == int(blocks[target])
            assert bool(rows.is_gap[0, row]) == (blocks[target - 1] >= blocks[target])
        num_added = sum(int(blocks[p - 1]) != int(blocks[p]) - 1 for p in range(1, 9))
        assert rows.token.shape[1] == 9 + num_added

    def test_streams_add_rows_for_their_heads_and_what_follows_these(self):
        steps = orders.strided_steps(256, 4)
        rows = self.plan(
            orders.after_given(torch.cat([torch.tensor([-1]), steps])[None], torch.ones(1, 257, dtype=torch.bool))[
                0
            ].tolist()
        )
        assert rows.token.shape[1] - 257 == 2 * (4 - 1)

    def test_rows_of_a_ragged_batch(self):
        blocks = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3]])
        rows = plan_rows(torch.zeros(2, 4, dtype=torch.bool), None, blocks, None, None)
        assert rows.token.shape == (2, 4 + 3)
        assert rows.token[0, 4:].tolist() == [NOTHING] * 3


def test_saved_model_comes_back_and_the_causal_model_saves_as_itself(tmp_path):
    model = causal("llama")
    streams, ids = from_causal_lm(model, later_text="wrap"), text(1, 9)
    blocks = block_index(ids, 1, orders.strided_steps(8, 2))
    streams.save_pretrained(tmp_path / "streams")
    loaded = CausalStreamsForMaskedDiffusion.from_pretrained(tmp_path / "streams")
    torch.testing.assert_close(loaded(ids, block_index=blocks).logits, streams(ids, block_index=blocks).logits)
    streams.base_model.save_pretrained(tmp_path / "causal")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "causal")
    assert type(plain) is LlamaForCausalLM
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)


def test_from_a_folder(tmp_path):
    model = causal("qwen2")
    model.save_pretrained(tmp_path)
    streams, ids = from_causal_lm(tmp_path), text(1, 9)
    torch.testing.assert_close(streams(ids).logits, from_causal_lm(model)(ids).logits)
    assert torch.equal(streams.gap.weight[0], model.get_input_embeddings().weight[1])


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (("gpt2", {}), {}, '`later_text="wrap"` turns rotary positions, and GPT2LMHeadModel has none.*"hide"'),
        (
            ("stablelm", {"num_key_value_heads": 2}),
            {},
            "layers of StableLmForCausalLM do not pass on to their attention.*Take",
        ),
        (
            ("nemotron", {"num_key_value_heads": 2}),
            {},
            "layers of NemotronForCausalLM do not pass on to their attention.*Take",
        ),
        (("deepseek_v3", LATENT), {}, "rotary positions of DeepseekV3ForCausalLM are applied in a way that is not"),
        (("gemma3_text", {"layer_types": ["full_attention"] * 2}), {}, "Gemma3ForCausalLM cannot be run in the way"),
        (("doge", {}), {}, "DogeForCausalLM cannot be run in the way"),
        (("bart", BART), {}, "BartForCausalLM reads a text otherwise when its rows come in another order"),
        (("bart", BART), {"later_text": "hide"}, "BartForCausalLM reads a text otherwise"),
        (("bert", {}), {"later_text": "hide"}, "BertLMHeadModel reads a text otherwise.*on their right"),
        (("falcon", {"alibi": False}), {"later_text": "hide"}, "FalconForCausalLM cannot run as SDPA"),
        (("gptj", {}), {}, "GPTJForCausalLM cannot run as SDPA"),
        (("gemma2", {"sliding_window": 64}), {"later_text": "hide"}, "Gemma2ForCausalLM cannot run as SDPA"),
        (("bloom", {}), {"later_text": "hide"}, "ALiBi"),
        (("mistral", {"sliding_window": 16}), {}, "sliding windows .`sliding_window`=16."),
        (("mamba", {}), {"later_text": "hide"}, "recurrent or convolutional"),
        (
            ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
            {"later_text": "hide"},
            "recurrent or convolutional",
        ),
        (
            ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
            {},
            "frequencies of LlamaForCausalLM change with the length",
        ),
        (
            ("llama", {}),
            {"gap_token_id": 99},
            r"`gap_token_id` must be a token .*\(0 to 30\), got 99.$",
        ),
        (
            ("llama", {}),
            {"gap_token_id": -1},
            r"`gap_token_id` must be a token .*\(0 to 30\), got -1.$",
        ),
        (("llama", {"bos_token_id": None, "eos_token_id": None}), {}, "names no start or end token"),
        (("llama", {}), {"mask_token_id": -1}, "`mask_token_id` must be at least 0, got -1"),
        (("llama", {}), {"later_text": "mirror"}, "later_text"),
        (("llama", {}), {"dtype": "float32"}, "`dtype` is for loading"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_work_is_refused(config, arguments, message):
    name, settings = config
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size" or name != "mamba"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **settings}))
    model.eval().get_input_embeddings().train()
    before = model.config._attn_implementation, [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        from_causal_lm(model, **arguments)
    assert (model.config._attn_implementation, [module.training for module in model.modules()]) == before


def test_what_is_no_model_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="got PeftModel.*merge_and_unload"):
        from_causal_lm(get_peft_model(causal("llama"), LoraConfig(r=2)))
    with pytest.raises(ValueError, match="LlamaModel has no map to logits"):
        from_causal_lm(causal("llama").model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="LlamaForCausalLM are not in memory"):
        from_causal_lm(model)
    with pytest.raises(ValueError, match="`attn_implementation` must be"):
        from_causal_lm(tmp_path, attn_implementation="eager")


@pytest.mark.parametrize("mask_token_id", [30, 500])
def test_the_mask_may_be_any_id(mask_token_id):
    prompt = text(2, 4).clamp(max=29)
    arguments = {"strategy": "strided", "num_streams": 2, "max_new_tokens": 8, "seed": 1, "suppress_tokens": [30]}
    expected = from_causal_lm(causal("llama")).generate(prompt, **arguments)
    drawn = from_causal_lm(causal("llama"), mask_token_id=mask_token_id).generate(prompt, **arguments)
    assert torch.equal(drawn, expected)


def test_uneven_prompts_and_gaps_of_a_batch_are_what_each_row_would_be_alone():
    streams = from_causal_lm(causal("llama", torch.float64))
    mask = streams.config.mask_token_id
    ids = torch.tensor([[0, 0, 5, 6, 7, mask, mask, 9], [4, 5, mask, 7, mask, mask, mask, 8]])
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    arguments = {"max_new_tokens": 5, "strategy": "strided", "num_streams": 2, "eos_token_id": None}
    together = streams.generate(ids, attention_mask=real, seed=[3, 4], **arguments)
    alone = [
        streams.generate(row[row > 0][None], seed=seed, **arguments) for row, seed in zip(ids, (3, 4), strict=True)
    ]
    assert torch.equal(together[0, 2:], alone[0][0])
    assert torch.equal(together[1], alone[1][0])


@pytest.mark.parametrize(
    ("later_text", "order"),
    [("wrap", [0, 4, 5, 1, 2, 3, 6, 7]), ("native", [0, 1, 2, 4, 5, 3, 6, 7]), ("hide", [0, 1, 2, 4, 5, 3, 6, 7])],
)
def test_given_text_on_the_right_is_read_first_where_it_is_wrapped(later_text, order):
    streams = from_causal_lm(causal("llama", torch.float64), later_text=later_text)
    mask = streams.config.mask_token_id
    ids = torch.tensor([[4, 5, 6, mask, 8, 9, mask, mask]])
    output = streams.generate(ids, eos_token_id=None, seed=1, return_dict_in_generate=True, output_logits=True)
    whole = streams(output.sequences, block_index=orders.block_index_from_order(torch.tensor([order]))).logits
    drawn = torch.stack(output.logits, dim=1)[0, [0, 3, 4]]
    torch.testing.assert_close(drawn, whole[0, [3, 6, 7]], rtol=0, atol=1e-10)
    scored = streams.score(output.sequences, labels=output.sequences.masked_fill(ids != mask, -100))
    expected = whole[0, [3, 6, 7]].log_softmax(-1).gather(-1, output.sequences[0, [3, 6, 7], None]).sum()
    torch.testing.assert_close(scored.log_likelihood[0], expected)


def test_llama_config_is_what_stands_in_where_none_is_given():
    assert isinstance(CausalStreamsForMaskedDiffusion.config_class().causal_lm_config, LlamaConfig)
