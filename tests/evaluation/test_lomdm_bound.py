"""The bound of a LoMDM against enumeration: of the sets of masks, of all texts, and of what the model then is."""

import itertools

import pytest
import torch
from canvas_chain import CANVASES, LENGTH, MASK, MASKED, VOCAB, toy
from tiny_mdlm import text, tiny_lomdm

from hf_diffusion.diffusion.order_bound import bound_terms, jump_chain_terms
from hf_diffusion.evaluation import estimate_lomdm_bound


TEXTS = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
ROWS = [5, 21, 46]
"""Texts whose tokens differ: of equal ones, no position is told from another."""
SUBSETS = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))[1:]
"""Every set of masked positions but the empty one."""


@pytest.fixture(scope="module")
def model():
    return toy(tiny_lomdm, c1=1.0, c2=0.9).double()


def visits(exponents, masked):
    """Probability that an order drawn by the exponents comes by these masks, over their sum: a closed form."""
    others = (~masked).nonzero()[:, 0].tolist()
    total = 0.0
    for size in range(len(others) + 1):
        for more in itertools.combinations(others, size):
            total = total + (-1) ** size / (exponents[masked].sum() + exponents[list(more)].sum())
    return total


def exact_bounds(model, ids):
    """The bound (1) and the one without timing, of one text [length], as sums over all sets of masks."""
    exponents = model.forward_exponents(ids[None])[0]
    copies = model.read_masked_copies(ids[None], ids[None], None, SUBSETS[:, None])
    log_probs, reverse = copies.log_probs[:, 0], copies.exponents[:, 0]
    terms = bound_terms(log_probs, exponents, reverse, SUBSETS)
    chain = jump_chain_terms(log_probs, exponents, reverse, SUBSETS)
    weight = torch.stack([visits(exponents, masked) for masked in SUBSETS])
    rate = (exponents * SUBSETS).sum(-1)
    return (weight * (terms.token + terms.velocity)).sum(), (weight * rate * (chain.token + chain.order)).sum()


@torch.no_grad()
def likelihoods(model):
    """log p of every text: of all ways to reveal it, position by position in proportion to the exponents."""
    output = model(CANVASES)
    log_probs = output.logits[..., :VOCAB].log_softmax(-1)
    rates = (output.exponents * MASKED) / (output.exponents * MASKED).sum(-1, keepdim=True).clamp(min=1e-300)
    index = {tuple(canvas): row for row, canvas in enumerate(CANVASES.tolist())}

    def log_p(text):
        p = {(): 1.0}
        for size in range(1, LENGTH + 1):
            for masked in itertools.combinations(range(LENGTH), size):
                row = index[tuple(MASK if n in masked else token for n, token in enumerate(text))]
                p[masked] = sum(
                    float(rates[row, n] * log_probs[row, n, text[n]].exp()) * p[tuple(m for m in masked if m != n)]
                    for n in masked
                )
        return torch.tensor(p[tuple(range(LENGTH))], dtype=torch.float64).log()

    return torch.stack([log_p(text) for text in TEXTS.tolist()])


@torch.no_grad()
def test_likelihoods_sum_to_one_and_the_bounds_bound_them(model):
    log_p = likelihoods(model)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)
    for row in ROWS:
        bound, without_timing = exact_bounds(model, TEXTS[row])
        assert bound > without_timing + 1e-6
        assert without_timing > -log_p[row] + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["jump_chain", "mask_fraction", "power_time", "uniform_time"])
def test_every_estimator_has_the_bound_as_its_mean(model, estimator):
    ids = TEXTS[ROWS].repeat(400, 1)
    estimate = estimate_lomdm_bound(
        model, ids, estimator=estimator, num_draws=20, generator=torch.Generator().manual_seed(1)
    )
    assert estimate.num_tokens.tolist() == [LENGTH] * len(ids)
    for row, text_row in enumerate(ROWS):
        exact, without_timing = exact_bounds(model, TEXTS[text_row])
        values, errors = estimate.bound[row::3], estimate.standard_error[row::3]
        error = float(values.std()) / len(values) ** 0.5
        assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.5)
        # Cut off at `least_time`, the bound is that of a sampler that ends there: a little more.
        slack = 0.02 if estimator in ("uniform_time", "power_time") else 0.0
        assert -4 * error < float(values.mean()) - float(exact) < 4 * error + slack
        if estimator == "jump_chain":
            values = estimate.bound_without_timing[row::3]
            error = float(values.std()) / len(values) ** 0.5
            assert abs(float(values.mean()) - float(without_timing)) < 4 * error


@torch.no_grad()
@pytest.mark.parametrize(
    "estimator", [None, "jump_chain_without_timing", "jump_chain", "mask_fraction", "power_time", "uniform_time"]
)
def test_score_estimates_the_same_bounds(model, estimator):
    for row in ROWS[:2]:
        scored = model.score(TEXTS[row : row + 1].repeat(500, 1), num_draws=12, estimator=estimator, seed=7)
        bound, without_timing = exact_bounds(model, TEXTS[row])
        expected = without_timing if estimator in (None, "jump_chain_without_timing") else bound
        values = -scored.log_likelihood
        error = float(values.std()) / len(values) ** 0.5
        slack = 0.02 if estimator in ("uniform_time", "power_time") else 0.0  # what is cut off costs a little more
        assert -4 * error < float(values.mean()) - float(expected) < 4 * error + slack
        assert float(scored.standard_error.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.5)
        assert scored.token_log_likelihood is None
        assert ("not in `generate`" in scored.sampler) == (estimator in ("uniform_time", "power_time"))


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["jump_chain_without_timing", "jump_chain", "mask_fraction", "uniform_time"])
def test_a_score_does_not_depend_on_the_batch_or_the_padding(estimator):
    model, ids = tiny_lomdm(), text(1, 8)
    alone = model.score(ids, num_draws=3, estimator=estimator, seed=5).log_likelihood
    padded, mask = torch.zeros(2, 11, dtype=torch.long), torch.ones(2, 11)
    padded[1, 2:10], mask[1, :2], mask[1, 10:] = ids[0], 0, 0
    together = model.score(padded, mask, num_draws=3, estimator=estimator, seed=4).log_likelihood
    torch.testing.assert_close(together[1:], alone)


def test_the_loss_is_the_bound_and_has_its_gradient():
    """Also for the law of the masks: the exact bound is differentiable in everything."""
    model = toy(tiny_lomdm, c1=1.0, c2=0.9).double()
    ids, head = TEXTS[ROWS[1]], model.forward_scheduler.out_proj.weight
    bound, _ = exact_bounds(model, ids)
    (exact,) = torch.autograd.grad(bound / LENGTH, head)
    model.train()
    torch.manual_seed(0)
    for estimator in ("jump_chain", "mask_fraction"):
        losses, gradients = [], []
        for _ in range(60):
            batch = ids.repeat(400, 1)
            loss = model(batch, labels=batch, bound_estimator=estimator).loss
            losses.append(loss.detach())
            gradients.append(torch.autograd.grad(loss, head)[0])
        losses, gradients = torch.stack(losses), torch.stack(gradients)
        assert abs(losses.mean() - bound / LENGTH) < 4 * losses.std() / 60**0.5
        error = gradients.std(0) / 60**0.5
        assert bool(((gradients.mean(0) - exact).abs() < 4.5 * error).all())
        assert bool((exact.abs() > 4.5 * error).any())


@torch.no_grad()
def test_given_tokens_and_padding_cost_nothing(model):
    ids = TEXTS[[5, 5]].clone()
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :3], mask[1, 1:] = -100, 0
    estimate = estimate_lomdm_bound(model, ids, mask, labels, num_draws=3)
    assert estimate.num_tokens.tolist() == [1, 1]
    canvas = ids[:1].clone()
    canvas[0, 3] = MASK
    nll = -model(canvas).logits[0, 3].log_softmax(-1)[ids[0, 3]]
    assert float(estimate.bound_without_timing[0]) == pytest.approx(float(nll), abs=1e-6)
    assert float(estimate.standard_error_without_timing[0]) < 1e-6


@torch.no_grad()
def test_a_uniform_model_scores_log_v_in_every_draw():
    model = tiny_lomdm()
    for weight in model.lm_head.parameters():
        weight.zero_()
    for head in (model.forward_scheduler, model.reverse_scheduler):
        head.out_proj.weight.zero_()
    estimate = estimate_lomdm_bound(model, text(3, 8), num_draws=4)
    expected = torch.full((3,), 8 * torch.tensor(11.0, dtype=torch.float64).log(), dtype=torch.float64)
    torch.testing.assert_close(estimate.bound, expected)
    torch.testing.assert_close(estimate.bound_without_timing, expected)
    assert float(estimate.standard_error.max()) < 1e-6


@torch.no_grad()
def test_masks_in_the_text_are_filled_from_the_labels_or_refused():
    model, ids = tiny_lomdm(), text(2, 8)
    masked = ids.masked_fill(torch.arange(8) < 4, 11)
    bounds = [
        estimate_lomdm_bound(model, shown, labels=ids, num_draws=3, generator=torch.Generator().manual_seed(0)).bound
        for shown in (ids, masked)
    ]
    assert torch.equal(*bounds)
    with pytest.raises(ValueError, match="`labels` hold the mask token"):
        estimate_lomdm_bound(model, masked)
    with pytest.raises(ValueError, match="`input_ids` holds the mask token .11. where there is no label"):
        estimate_lomdm_bound(model, masked, labels=ids.masked_fill(torch.arange(8) < 4, -100))


def test_wrong_calls_are_refused(model):
    ids = TEXTS[:2]
    for arguments, message in (
        ({"labels": ids + 9}, "which is no token of the vocabulary"),
        ({"labels": ids[:, :2]}, "`labels` must have the shape of `input_ids`"),
        ({"attention_mask": torch.ones(2, 3)}, "`attention_mask` must have the shape of `input_ids`"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_lomdm_bound(model, ids, **arguments)
    with pytest.raises(ValueError, match="`model` must be a `LoMDMForMaskedDiffusion`, got MDLM"):
        estimate_lomdm_bound(toy(), ids)
    with pytest.raises(ValueError, match="`num_draws` must be at least 2"):
        estimate_lomdm_bound(model, TEXTS[:2], num_draws=1)
    with pytest.raises(ValueError, match="`estimator` must be one of"):
        estimate_lomdm_bound(model, TEXTS[:2], estimator="elbo")
    with pytest.raises(ValueError, match="`model` is in training mode"):
        estimate_lomdm_bound(tiny_lomdm().train(), text(1, 4))
