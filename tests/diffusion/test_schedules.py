"""Noise schedules against the reference's numbers, numerical derivatives and their own inverses."""

import math

import pytest
import torch
from safetensors.torch import load_file

from hf_diffusion.diffusion.schedules import (
    SCHEDULES,
    Cosine,
    CosineSquared,
    Geometric,
    Linear,
    LogLinear,
    Polynomial,
    describe_schedule,
    make_schedule,
)


SOME = [
    LogLinear(),
    LogLinear(epsilon=0.0),
    Cosine(),
    CosineSquared(),
    Polynomial(power=3.0),
    Polynomial(power=0.5, epsilon=0.0),
    Linear(sigma_min=1e-3, sigma_max=7.0),
    Geometric(sigma_min=1e-3, sigma_max=7.0),
]
INSIDE = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)


@pytest.fixture(params=SOME, ids=str)
def schedule(request):
    return request.param


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("loglinear", LogLinear()),
        ("cosine", Cosine()),
        ("cosinesqr", CosineSquared()),
        ("linear", Linear(sigma_min=1e-3, sigma_max=7.0)),
        ("geometric", Geometric(sigma_min=1e-3, sigma_max=7.0)),
    ],
)
def test_reference_numbers(shared, name, schedule):
    golden = load_file(shared / "golden/mdlm/subs/golden.safetensors")
    t = golden["noise.t"]
    # The reference subtracts from 1 in float32, which costs its cosine four digits where sigma is small or large.
    tolerance = {"rtol": 1e-4, "atol": 1e-7} if "cosine" in name else {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(schedule.sigma(t), golden[f"noise.{name}.sigma"], **tolerance)
    torch.testing.assert_close(schedule.dsigma(t), golden[f"noise.{name}.dsigma"], **tolerance)


def test_derivatives_are_those_of_the_functions(schedule):
    t = INSIDE.clone().requires_grad_()
    (dsigma,) = torch.autograd.grad(schedule.sigma(t).sum(), t)
    torch.testing.assert_close(schedule.dsigma(INSIDE), dsigma, rtol=1e-9, atol=1e-12)
    (dalpha,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.velocity(INSIDE), -dalpha / (1 - schedule.alpha(INSIDE)), rtol=1e-6, atol=1e-9)


def test_the_quantities_belong_together(schedule):
    alpha = schedule.alpha(INSIDE)
    torch.testing.assert_close(-alpha.log(), schedule.sigma(INSIDE))
    torch.testing.assert_close(1 - alpha, schedule.mask_probability(INSIDE))


def test_inverses(schedule):
    torch.testing.assert_close(schedule.time_at_sigma(schedule.sigma(INSIDE)), INSIDE, rtol=1e-7, atol=1e-10)
    probability = schedule.mask_probability(INSIDE)
    torch.testing.assert_close(schedule.time_at_mask_probability(probability), INSIDE, rtol=1e-7, atol=1e-10)


def test_masks_only_ever_become_more(schedule):
    assert bool((schedule.mask_probability(torch.linspace(0, 1, 1001)).diff() >= 0).all())


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine(), CosineSquared(), Polynomial(power=3.0)], ids=str)
def test_small_probabilities_keep_their_digits_in_float32(schedule):
    t = torch.tensor([1e-4, 1e-3, 1e-2])
    exact = schedule.mask_probability(t.double())
    torch.testing.assert_close(schedule.mask_probability(t).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", [LogLinear(0.0), Cosine(0.0), CosineSquared(0.0), Polynomial(2.0, 0.0)], ids=str)
def test_without_epsilon_all_is_text_at_0_and_all_is_masks_at_1(schedule):
    torch.testing.assert_close(
        schedule.mask_probability(torch.tensor([0.0, 1.0], dtype=torch.float64)), torch.tensor([0.0, 1.0]).double()
    )


def test_the_velocity_of_loglinear_is_one_over_t():
    assert torch.equal(LogLinear().velocity(INSIDE), 1 / INSIDE)
    assert math.isclose(float(LogLinear().sigma(torch.tensor(1.0, dtype=torch.float64))), -math.log(1e-3))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_comes_back_from_its_description(name):
    schedule = make_schedule(name)
    assert make_schedule(describe_schedule(schedule)) == schedule
    assert make_schedule(schedule) is schedule


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("logarithmic", "`noise_schedule` must name one of.*'logarithmic'"),
        ({"epsilon": 0.1}, "`noise_schedule` must name one of.*None"),
        ({"type": "cosine", "eps": 0.1}, "takes \\['epsilon'\\], got 'eps'"),
        ({"type": "cosine", "epsilon": -1}, "`epsilon` of the noise schedule must be a number of at least 0"),
        ({"type": "cosine", "epsilon": "0"}, "`epsilon` of the noise schedule must be a number"),
        ({"type": "cosine", "epsilon": 1}, "`epsilon` of the noise schedule must be less than 1"),
        ({"type": "polynomial", "power": 0}, "`power` of the noise schedule must be positive"),
        ({"type": "linear", "sigma_min": 3, "sigma_max": 2}, "`sigma_min` of the noise schedule must be less than"),
        ({"type": "geometric", "sigma_min": 0}, "`sigma_min` of a geometric noise schedule must be positive"),
    ],
)
def test_wrong_descriptions_are_refused(description, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(description)
