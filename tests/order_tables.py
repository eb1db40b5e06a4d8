"""The smallest models with an order: random tables over all texts and all masked texts, to be enumerated in float64.

Three positions, two tokens. Everything has the axes [texts, sets, length]: all texts, all sets of masked positions.
"""

import itertools
import math

import numpy
import torch


LENGTH, VOCAB_SIZE = 3, 2
TEXTS = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=LENGTH)))
SETS = torch.tensor([[bool(number >> n & 1) for n in range(LENGTH)] for number in range(2**LENGTH)])
MASKED = SETS.expand(len(TEXTS), -1, -1)
CANVASES = torch.where(MASKED, VOCAB_SIZE, TEXTS[:, None])
_NUMBER_OF_CANVAS = (CANVASES * (VOCAB_SIZE + 1) ** torch.arange(LENGTH)).sum(-1)


class Tables:
    """Random, from a seed.

    Attributes:
        exponents: e [texts, length], between 0.4 and 1.6.
        reverse_exponents: ê [texts, sets, length], the same range; texts that look alike under masks share it.
        log_law: [texts, sets, length, vocab_size], shared in the same way.
        log_probs: [texts, sets, length] in nats, of the text itself.
    """

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        canvases = (VOCAB_SIZE + 1) ** LENGTH
        draw = {"generator": generator, "dtype": torch.float64}
        self.exponents = 0.4 + 1.2 * torch.rand(TEXTS.shape, **draw)
        self.reverse_table = 0.4 + 1.2 * torch.rand(canvases, LENGTH, **draw)
        self.reverse_exponents = self.on_canvases(self.reverse_table)
        self.log_law = self.on_canvases(torch.randn(canvases, LENGTH, VOCAB_SIZE, **draw).log_softmax(-1))
        token = TEXTS[:, None, :, None].expand(*MASKED.shape, 1)
        self.log_probs = self.log_law.gather(-1, token)[..., 0]

    @staticmethod
    def on_canvases(table):
        return table[_NUMBER_OF_CANVAS]


def number_of_set(positions):
    return sum(1 << n for n in positions)


def state_weights(exponents, least_time=0.0):
    """The integral from `least_time` to 1 of q(masks | text) / t dt, [texts, sets], in closed form; 0 for no masks.

    The product over masked of t^e and over visible of 1 - t^e is multiplied out into powers of t.
    """

    def of_power(power):
        return (1 - least_time**power) / power

    weights = [torch.zeros_like(exponents[:, 0])]
    for masked in SETS[1:].tolist():
        among = [n for n in range(len(masked)) if masked[n]]
        others = [n for n in range(len(masked)) if not masked[n]]
        subsets = [more for size in range(len(others) + 1) for more in itertools.combinations(others, size)]
        weights.append(sum((-1) ** len(more) * of_power(exponents[:, [*among, *more]].sum(-1)) for more in subsets))
    return torch.stack(weights, dim=1)


def nelbo(tables, least_time=0.0, scale=1.0):
    """The bound of each text [texts] in nats, from its definition and the closed form of its weights.

    Args:
        least_time: the integral runs from here.
        scale: of all exponents, the reverse ones included.
    """
    e, reverse = scale * tables.exponents[:, None], scale * tables.reverse_exponents
    each = -e * tables.log_probs + e * (e / reverse).log() - e + reverse
    return (state_weights(e[:, 0], least_time) * (each * SETS).sum(-1)).sum(-1)


def nll(tables):
    """-log p(text) [texts] in nats of the continuous-time model: what is next, by ê, then its token."""
    likelihood = [torch.ones(len(TEXTS), dtype=torch.float64)]
    for number, masked in enumerate(SETS.tolist()):
        if number:
            rate = tables.reverse_exponents[:, number]
            among = [n for n in range(LENGTH) if masked[n]]
            total = rate[:, among].sum(-1)
            chances = tables.log_probs[:, number].exp() * rate / total[:, None]
            likelihood.append(sum(chances[:, n] * likelihood[number - (1 << n)] for n in among))
    return -likelihood[-1].log()


def nll_in_steps(tables, times, reveal_probability):
    """-log p(text) [texts] in nats of the sampler in steps, which may reveal several at once.

    Args:
        times: [steps + 1] from 0 to 1.
        reveal_probability: from ê and s/t, what the sampler uses.
    """
    pairs = [(m, left) for m in range(len(SETS)) for left in range(len(SETS)) if m & left == left]
    before, after = torch.tensor(pairs).T
    likelihood = torch.zeros(len(TEXTS), len(SETS), dtype=torch.float64)
    likelihood[:, 0] = 1
    probability = tables.log_probs.exp()
    for s, t in itertools.pairwise(times.tolist()):
        reveals = reveal_probability(tables.reverse_exponents, s / t)
        each = torch.where(SETS[after], 1 - reveals[:, before], (reveals * probability)[:, before])
        chances = each.where(SETS[before], 1).prod(-1) * likelihood[:, after]
        likelihood = torch.zeros_like(likelihood).index_add(1, before, chances)
    return -likelihood[:, -1].log()


def gauss_legendre(panels, nodes=20):
    """Points and weights of the integral from the first to the last of the numbers given, in panels between them."""
    points, weights = (torch.from_numpy(values) for values in numpy.polynomial.legendre.leggauss(nodes))
    starts, ends = torch.tensor(panels[:-1], dtype=torch.float64), torch.tensor(panels[1:], dtype=torch.float64)
    half = (ends - starts)[:, None] / 2
    return (starts[:, None] + half * (1 + points)).flatten(), (half * weights).flatten()


def any_order_nll(log_probs, positions, visible):
    """The mean over all orders of `positions`, `visible` ones given and others masked, of the chain rule, [texts]."""
    total = 0.0
    for order in itertools.permutations(positions):
        for rank, n in enumerate(order):
            masked = set(range(LENGTH)) - set(visible) - set(order[:rank])
            total = total - log_probs[:, number_of_set(masked), n] / math.factorial(len(order))
    return total
