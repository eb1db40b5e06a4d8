"""`score` against the law of `generate`: the same Markov chains over all canvases, and sums over all orders."""

import itertools
import math

import pytest
import torch
from canvas_chain import (
    CANVASES,
    INFILL,
    LENGTH,
    MASK,
    MASKED,
    NOTHING,
    VOCAB,
    everywhere,
    grid,
    one_of,
    predictions,
    toy,
    transition,
)
from families import FAMILIES
from tiny_mdlm import tiny, tiny_lomdm

from hf_diffusion import ARMDConfig, ARMDForMaskedDiffusion


TEXTS = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
NUMBER = {tuple(canvas): row for row, canvas in enumerate(CANVASES.tolist())}
OF_TEXTS = torch.tensor([NUMBER[tuple(text)] for text in TEXTS.tolist()])
CHOSEN = torch.tensor([5, 21, 46])
"""Texts whose tokens differ: of equal ones, no position is told from another."""


@pytest.fixture(scope="module")
def model():
    return toy().double()


@pytest.fixture(scope="module")
def learned():
    return toy(tiny_lomdm, c1=1.0, c2=0.9).double()


def law_of(canvas, chain):
    """Probability [texts] of ending at each text, from `canvas`."""
    law = (torch.tensor(canvas) == CANVASES).all(-1).double()
    for step in chain:
        law = law @ step
    return law[OF_TEXTS]


def fits(canvas):
    """Bool [texts], those that hold what is given in `canvas`."""
    canvas = torch.tensor(canvas)
    return ((canvas == TEXTS) | (canvas == MASK)).all(-1)


def labels_of(texts, canvas):
    return texts.masked_fill(torch.tensor(canvas) != MASK, -100)


def positions(*numbers):
    """Reveals [canvases, positions] of exactly these."""
    return torch.isin(torch.arange(LENGTH), torch.tensor(numbers)).double().expand(len(CANVASES), -1) * MASKED


def highest(scores):
    return torch.nn.functional.one_hot(scores.masked_fill(~MASKED, -torch.inf).argmax(-1), LENGTH) * MASKED


def entropy(predicted):
    return torch.special.entr(predicted).sum(-1)


def margin(predicted):
    in_order = predicted.sort(-1, descending=True).values
    return in_order[..., 0] - in_order[..., 1]


def sure(predicted, threshold):
    confidence = predicted.amax(-1)
    return ((confidence > threshold) | highest(confidence).bool()) & MASKED


# Of each strategy: where it begins, and which positions it reveals in each of its passes.
EXACT = [
    ({"strategy": "autoregressive"}, NOTHING, lambda p: [positions(n) for n in range(LENGTH)]),
    ({"strategy": "autoregressive"}, INFILL, lambda p: [positions(n) for n in (0, 2, 3)]),
    ({"strategy": "strided", "num_streams": 2}, NOTHING, lambda p: [positions(0), positions(2), positions(1, 3)]),
    ({"strategy": "strided", "num_streams": 2}, INFILL, lambda p: [positions(0), positions(3), positions(2)]),
    (
        {"strategy": "semi_autoregressive", "block_length": 3, "block_strategy": "spread", "max_denoising_steps": 2},
        NOTHING,
        lambda p: [positions(0, 2), positions(1), positions(3)],
    ),
    ({"strategy": "confidence"}, INFILL, lambda p: [highest(p.amax(-1))] * 3),
    ({"strategy": "margin"}, INFILL, lambda p: [highest(margin(p))] * 3),
    ({"strategy": "entropy"}, INFILL, lambda p: [highest(-entropy(p))] * 3),
    ({"strategy": "confidence", "confidence_threshold": 0.8}, INFILL, lambda p: [sure(p, 0.8)] * 3),
]


@pytest.mark.parametrize(
    ("settings", "canvas", "reveals"), EXACT, ids=lambda value: "" if callable(value) else str(value)
)
def test_deterministic_orders_have_the_likelihood_of_their_chain(model, settings, canvas, reveals):
    predicted = predictions(model)
    chain = [transition(predicted, reveal.double()) for reveal in reveals(predicted)]
    law, texts = law_of(canvas, chain)[fits(canvas)], TEXTS[fits(canvas)]
    scored = model.score(texts, labels=labels_of(texts, canvas), **settings)
    assert scored.is_exact
    assert scored.estimator == "exact"
    assert scored.standard_error is None
    assert scored.num_tokens.tolist() == [canvas.count(MASK)] * len(texts)
    torch.testing.assert_close(scored.log_likelihood, law.log(), rtol=0, atol=1e-9)
    torch.testing.assert_close(scored.token_log_likelihood.sum(1), law.log(), rtol=0, atol=1e-9)
    assert float(scored.log_likelihood.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_the_fastest_position_first(learned):
    predicted, rates = predictions(learned), learned(CANVASES).exponents.detach().double()
    law = law_of(INFILL, [transition(predicted, highest(rates).double())] * 3)[fits(INFILL)]
    texts = TEXTS[fits(INFILL)]
    scored = learned.score(texts, labels=labels_of(texts, INFILL), strategy="velocity")
    torch.testing.assert_close(scored.log_likelihood, law.log(), rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def armd():
    torch.manual_seed(0)
    config = ARMDConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.4
    )
    return ARMDForMaskedDiffusion(config).double().eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "block_index", [[0, 1, 2, 3], [3, 1, 0, 2], [0, 2, 1, 2], [0, 0, 0, 0]], ids=lambda index: str(index)
)
def test_armd_in_any_order_is_read_pass_by_pass(armd, block_index):
    index = torch.tensor(block_index).expand(len(TEXTS), -1)
    expected = torch.zeros(TEXTS.shape, dtype=torch.float64)
    for step in range(max(block_index) + 1):
        asked = (index[0] == step).nonzero()[:, 0].expand(len(TEXTS), -1)
        canvas = TEXTS.masked_fill(index >= step, MASK)
        logits = armd(canvas, block_index=index, query_positions=asked).logits
        expected.scatter_(1, asked, logits.log_softmax(-1).gather(-1, TEXTS.gather(1, asked)[..., None])[..., 0])
    scored = armd.score(TEXTS, block_index=index)
    assert (scored.is_exact, scored.nfe, scored.sampler) == (True, 1, "the order of `block_index`")
    torch.testing.assert_close(scored.token_log_likelihood, expected, rtol=0, atol=1e-12)
    assert float(scored.log_likelihood.exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "block_index"),
    [
        ({}, [0, 1, 2, 3]),
        ({"strategy": "strided", "num_streams": 2}, [0, 2, 1, 2]),
        ({"strategy": "semi_autoregressive", "block_length": 2, "max_denoising_steps": 1}, [0, 0, 1, 1]),
    ],
)
def test_armd_by_a_strategy_is_its_order(armd, settings, block_index):
    scored = armd.score(TEXTS, **settings)
    expected = armd.score(TEXTS, block_index=torch.tensor(block_index).expand(len(TEXTS), -1))
    torch.testing.assert_close(scored.token_log_likelihood, expected.token_log_likelihood)
    assert (scored.is_exact, scored.nfe) == (True, 1)


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_what_generate_draws_has_the_product_of_what_it_was_drawn_with(name, family):
    """With caches, prompts of two lengths, gaps and all."""
    model = family.model(torch.float64)
    prompt = torch.randint(22, (2, 7), generator=torch.Generator().manual_seed(1))
    prompt[:, [2, 3, 5]] = model.config.mask_token_id
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    for settings in family.strategies:
        output = model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=6,
            return_dict_in_generate=True,
            output_logits=True,
            seed=3,
            **settings,
        )
        mask_of_all = torch.nn.functional.pad(mask, (0, 6), value=1)
        labels = output.sequences.masked_fill(output.steps < 0, -100)
        scored = model.score(output.sequences, mask_of_all, labels, **few_draws(model, settings))
        assert scored.num_tokens.tolist() == [9, 9]
        if scored.is_exact:
            torch.testing.assert_close(
                scored.token_log_likelihood.exp().float(), output.confidence.where(labels >= 0, 1)
            )


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_greedy_text_is_told(name, family):
    model = family.model(torch.float64)
    prompt = torch.randint(22, (2, 3), generator=torch.Generator().manual_seed(1))
    for settings in family.strategies:
        if few_draws(model, settings) != settings:
            assert model.score(prompt, **few_draws(model, settings)).is_greedy is None
            continue
        output = model.generate(prompt, max_new_tokens=6, do_sample=False, **settings)
        output[1, 5] = (output[1, 5] + 1) % 22
        labels = output.masked_fill(torch.arange(9) < 3, -100)
        assert model.score(output, labels=labels, **settings).is_greedy.tolist() == [True, False]


def few_draws(model, settings):
    strategy = settings.get("strategy") or model.default_strategy(None, in_block=False)
    of_block = settings.get("block_strategy")
    if strategy == "semi_autoregressive" and of_block is None:
        of_block = model.default_strategy(None, in_block=True)
    return {"num_draws": 2, **settings} if {"ancestral", "first_hitting"} & {strategy, of_block} else settings


def mean_over_orders(predicted, text, groups):
    """The mean over all orders of each group of positions, one after the other, of the log of the chain rule."""
    total, orders = 0.0, list(itertools.product(*(itertools.permutations(group) for group in groups)))
    for order in orders:
        canvas = [token if n in sum(groups, ()) else None for n, token in enumerate(text)]
        canvas = [MASK if token is not None else text[n] for n, token in enumerate(canvas)]
        for n in itertools.chain(*order):
            total += float(predicted[NUMBER[tuple(canvas)], n, text[n]].log())
            canvas[n] = text[n]
    return total / len(orders)


def estimates(model, text, canvas=NOTHING, rows=400, num_draws=12, **settings):
    """Mean and standard error over rows of independent estimates, whose own errors must be right."""
    texts = text.repeat(rows, 1)
    scored = model.score(texts, labels=labels_of(texts, canvas), num_draws=num_draws, seed=1, **settings)
    values = scored.log_likelihood
    assert not scored.is_exact
    assert float(scored.standard_error.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.25, abs=1e-9)
    if scored.token_log_likelihood is not None:
        torch.testing.assert_close(scored.token_log_likelihood.sum(1), values)
        assert not bool(scored.token_log_likelihood[:, torch.tensor(canvas) != MASK].any())
    return float(values.mean()), float(values.std()) / rows**0.5


@pytest.mark.parametrize("estimator", ["number_of_masks", "orders"])
@pytest.mark.parametrize(
    ("canvas", "settings", "groups"),
    [
        (NOTHING, {}, [(0, 1, 2, 3)]),
        (INFILL, {}, [(0, 2, 3)]),
        (NOTHING, {"block_size": 2}, [(0, 1), (2, 3)]),
        (NOTHING, {"block_size": 3}, [(0, 1, 2), (3,)]),
        (INFILL, {"block_size": 2}, [(0,), (2, 3)]),
    ],
    ids=str,
)
def test_the_bound_of_mdlm_is_the_mean_over_orders_and_below_the_likelihood(estimator, canvas, settings, groups):
    model = toy(**settings).double()
    predicted, text = predictions(model), TEXTS[21:22]
    assert fits(canvas)[21]
    mean, error = estimates(model, text, canvas, estimator=estimator)
    bound = mean_over_orders(predicted, text[0].tolist(), groups)
    assert abs(mean - bound) < 4 * error
    group = torch.tensor([next((i for i, g in enumerate(groups) if n in g), -1) for n in range(LENGTH)])
    first = group.where(MASKED, LENGTH).amin(-1, keepdim=True)
    law = law_of(canvas, [one_of(MASKED & (group == first))(predicted)] * LENGTH)
    assert bound < float(law[21].log()) + 1e-12


def test_a_network_that_reads_the_noise_level_has_one_bound_by_both_estimators():
    model = toy(time_conditioning=True).double()
    (mean, error), (other, other_error) = (
        estimates(model, TEXTS[21:22], estimator=estimator) for estimator in ("number_of_masks", "orders")
    )
    assert abs(mean - other) < 4 * math.hypot(error, other_error)
    assert math.hypot(error, other_error) < 0.1


@pytest.mark.parametrize("num_steps", [1, 3])
def test_ancestral_sampling_in_few_steps_has_a_bound_of_its_own(model, num_steps):
    predicted, text = predictions(model), TEXTS[21].tolist()
    bound = 0.0
    for plan in itertools.product(range(num_steps), repeat=LENGTH):  # the step of each position, all equally likely
        for n, step in enumerate(plan):
            canvas = tuple(text[m] if plan[m] < step else MASK for m in range(LENGTH))
            bound += float(predicted[NUMBER[canvas], n, text[n]].log()) / num_steps**LENGTH
    mean, error = estimates(model, TEXTS[21:22], strategy="ancestral", max_denoising_steps=num_steps)
    assert abs(mean - bound) <= 4 * error + 1e-9
    chain = [transition(predicted, everywhere((before - after) / before)) for before, after in grid(num_steps)]
    assert bound < float(law_of(NOTHING, chain)[21].log()) + 1e-12


def test_orders_of_a_learned_law_are_drawn_from_it(learned):
    predicted, rates, text = predictions(learned), learned(CANVASES).exponents.detach().double(), TEXTS[21].tolist()
    bound = 0.0
    for order in itertools.permutations(range(LENGTH)):
        canvas, probability, total = [MASK] * LENGTH, 1.0, 0.0
        for n in order:
            row = NUMBER[tuple(canvas)]
            probability *= float(rates[row, n] / (rates[row] * MASKED[row]).sum())
            total += float(predicted[row, n, text[n]].log())
            canvas[n] = text[n]
        bound += probability * total
    mean, error = estimates(learned, TEXTS[21:22], estimator="orders")
    assert abs(mean - bound) < 4 * error
    assert bound < float(law_of(NOTHING, [one_of(rates)(predicted)] * LENGTH)[21].log())


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_a_uniform_model_scores_log_v_with_every_strategy(name, family):
    model, ids = family.model(torch.float64), torch.randint(22, (3, 9))
    for weight in model.lm_head.parameters():
        weight.data.zero_()
    if model.learns_order:
        for head in (model.forward_scheduler, model.reverse_scheduler):
            head.out_proj.weight.data.zero_()
    num_predicted = int(model(ids).logits.isfinite().sum(-1).max())
    expected = torch.full((3,), -9 * math.log(num_predicted), dtype=torch.float64)
    for settings in ({}, *family.strategies):
        torch.testing.assert_close(model.score(ids, **few_draws(model, settings)).log_likelihood, expected)
    if model.config.model_type == "mdlm" or model.learns_order:
        assert not model.score(ids).is_exact


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("armd", "orders"),
        *[(name, estimator) for name in ("mdlm", "mdlm_blocks") for estimator in ("number_of_masks", "orders")],
        *[("lomdm", estimator) for estimator in ("jump_chain_without_timing", "jump_chain", "mask_fraction")],
        *[("lomdm", estimator) for estimator in ("power_time", "uniform_time", "orders")],
    ],
)
def test_a_uniform_model_scores_log_v_by_every_estimator(name, estimator):
    model = FAMILIES[name].model(torch.float64)
    for weight in model.lm_head.parameters():
        weight.data.zero_()
    if model.learns_order:
        for head in (model.forward_scheduler, model.reverse_scheduler):
            head.out_proj.weight.data.zero_()
    ids = torch.randint(22, (200, 9))
    settings = {"strategy": "semi_autoregressive", "block_strategy": "first_hitting"} if name == "mdlm_blocks" else {}
    settings = settings or {"strategy": "first_hitting"}
    scored = model.score(ids, estimator=estimator, num_draws=4, seed=2, **settings)
    num_predicted = int(model(ids[:1]).logits.isfinite().sum(-1).max())
    excess = scored.log_likelihood + 9 * math.log(num_predicted)
    # Those that draw times reveal a drawn number of tokens in a draw; the others all of them.
    assert abs(float(excess.mean())) <= 4 * float(excess.std()) / 200**0.5 + 1e-6
    if estimator not in ("mask_fraction", "power_time", "uniform_time"):
        assert float(excess.abs().max()) < 1e-6


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_a_text_scores_the_same_alone_and_padded_in_a_batch(name, family, side):
    model = family.model(torch.float64)
    ids = torch.randint(22, (1, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(9) < 2, -100)
    kept = {"left": range(3, 12), "right": range(9), "inside": [0, 1, 4, 5, 6, 7, 9, 10, 11]}[side]
    padded, mask, padded_labels = torch.full((2, 12), 7), torch.zeros(2, 12, dtype=torch.long), torch.full((2, 12), 9)
    padded[1, list(kept)], mask[1, list(kept)], padded_labels[1, list(kept)] = ids[0], 1, labels[0]
    padded[0], mask[0] = torch.randint(22, (12,)), 1
    for settings in ({}, *(family.strategies if side == "left" else ())):
        settings = few_draws(model, settings)
        alone = model.score(ids, labels=labels, seed=6, **settings)
        together = model.score(padded, mask, padded_labels, seed=[3, 6], **settings)
        torch.testing.assert_close(together.log_likelihood[1:], alone.log_likelihood)
        assert together.num_tokens[1] == alone.num_tokens[0] == 7
        if alone.token_log_likelihood is not None:
            of_tokens = together.token_log_likelihood[1]
            torch.testing.assert_close(of_tokens[list(kept)], alone.token_log_likelihood[0])
            assert float(of_tokens.sum()) == pytest.approx(float(of_tokens[list(kept)].sum()))


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_bfloat16_scores_close_to_float32(name, family):
    # Rounding to 8 bits in each of four layers of large weights; what is drawn is the same.
    ids = torch.randint(22, (4, 24), generator=torch.Generator().manual_seed(1))
    tolerance = {"armd": 0.003, "armd_left_neighbour": 0.003, "causal_streams": 0.006}.get(name, 0.03)
    exact, estimated = {"strategy": "strided", "num_streams": 3}, {"strategy": "first_hitting", "num_draws": 4}
    in_blocks = {"strategy": "autoregressive"}, {"num_draws": 4}
    for settings in in_blocks if name == "mdlm_blocks" else (exact, estimated):
        in_full, rounded = (
            family.model(dtype).score(ids, seed=1, **settings) for dtype in (torch.float32, torch.bfloat16)
        )
        assert in_full.is_exact == ("num_draws" not in settings)
        torch.testing.assert_close(rounded.log_likelihood, in_full.log_likelihood, rtol=tolerance, atol=0)


def test_no_token_to_score_and_texts_of_one_token(model, armd):
    for one in (model, armd):
        ids = TEXTS[:2]
        labels = torch.full_like(ids, -100)
        labels[1, 2] = ids[1, 2]
        scored = one.score(ids, labels=labels)
        assert scored.num_tokens.tolist() == [0, 1]
        assert float(scored.log_likelihood[0]) == 0
        assert float(scored.log_likelihood[1]) < 0
        assert one.score(torch.tensor([[2]])).num_tokens.tolist() == [1]


def test_the_samplers_settings_are_named(model):
    scored = model.score(TEXTS[:1], strategy="semi_autoregressive", block_length=2, block_strategy="spread")
    assert scored.sampler == 'generate(strategy="semi_autoregressive", block_length=2, block_strategy="spread")'
    scored = model.score(TEXTS[:1])
    assert (scored.sampler, scored.estimator, scored.nfe) == (
        'generate(strategy="first_hitting")',
        "number_of_masks",
        16,
    )


def test_settings_of_the_generation_config_are_left_aside(armd):
    expected = armd.score(TEXTS).log_likelihood
    armd.generation_config.temperature, armd.generation_config.eos_token_id = 0.5, 1
    assert torch.equal(armd.score(TEXTS).log_likelihood, expected)


def test_a_text_with_masks_is_scored_by_its_labels(model):
    hidden = TEXTS[CHOSEN].masked_fill(torch.arange(LENGTH) < 2, MASK)
    shown = model.score(hidden, labels=TEXTS[CHOSEN], strategy="strided", num_streams=2)
    expected = model.score(TEXTS[CHOSEN], strategy="strided", num_streams=2)
    assert torch.equal(shown.log_likelihood, expected.log_likelihood)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "holds no text"),
        ({"input_ids": torch.zeros(4)}, "`input_ids` must be an integer tensor .batch, length."),
        ({"input_ids": torch.tensor([[1, MASK]])}, "`labels` hold the mask token"),
        ({"input_ids": torch.tensor([[1, 77]])}, "holds the token id 77, outside the vocabulary"),
        ({"labels": torch.tensor([[1, 2]])}, "`labels` must have the shape"),
        ({"attention_mask": torch.zeros(1, 4)}, "`attention_mask` has a row of zeros only"),
        ({"temperature": 0.5}, "`temperature`=0.5 has no effect in `score`"),
        ({"temprature": 0.5}, "`temprature` is not an argument of generation.*`temperature`"),
        ({"strategy": "diagonal"}, "`strategy` must be one of"),
        ({"strategy": "strided"}, "needs `num_streams`"),
        ({"estimator": "elbo"}, "`estimator` must be one of .'number_of_masks', 'orders'. for generate"),
        ({"strategy": "autoregressive", "num_draws": 4}, "`num_draws` .4. has no effect: .* nothing is drawn"),
        ({"num_draws": 1}, "`num_draws` must be at least 2"),
        ({"generator": torch.Generator(), "seed": 1}, "`generator` and `seed` are both"),
        ({"block_index": torch.arange(4)[None]}, "`block_index`: MDLMForMaskedDiffusion reads no order"),
        (
            {
                "strategy": "ancestral",
                "max_denoising_steps": 4,
                "remasking": "cap",
                "remasking_strength": 0.5,
            },
            "`remasking`='cap': a text comes about in too many ways",
        ),
    ],
)
def test_wrong_calls_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.score(**{"input_ids": TEXTS[:1], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_index": torch.tensor([[0, 1, 3, 4]])}, "without a gap"),
        ({"block_index": torch.arange(3)[None]}, "`block_index` must have the shape of `input_ids`"),
        ({"strategy": "autoregressive"}, "`strategy`='autoregressive' has no effect with `block_index`"),
        ({"labels": torch.tensor([[1, 1, 1, -100]])}, "puts a given token .* after one that is scored"),
    ],
)
def test_wrong_orders_are_refused(armd, arguments, message):
    with pytest.raises(ValueError, match=message):
        armd.score(**{"input_ids": TEXTS[40:41], "block_index": torch.arange(4)[None], **arguments})


def test_a_model_in_training_and_weights_that_are_not_numbers_are_refused():
    model = tiny()
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="`model` is in training mode"):
        model.train().score(ids)
    model.eval().lm_head.weight.data[0] = torch.nan
    for settings in ({}, {"strategy": "autoregressive"}):
        with pytest.raises(ValueError, match="`logits` hold NaN"):
            model.score(ids, **settings)
