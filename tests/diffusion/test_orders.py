"""Orders against the paper's own example, counting, and what a permutation is."""

import pytest
import torch

from hf_diffusion.diffusion import orders


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_strided_order_of_the_papers_example():
    # N = 8 in two streams: 1, 5, then (2, 6), (3, 7), (4, 8).
    assert orders.strided_steps(8, 2).tolist() == [0, 2, 3, 4, 1, 2, 3, 4]


def test_one_stream_is_left_to_right():
    assert torch.equal(orders.strided_steps(7, 1), torch.arange(7))


@pytest.mark.parametrize("length", range(1, 20))
def test_strided_steps_number_heads_plus_the_longest_stream(length):
    for num_streams in range(1, length + 1):
        steps = orders.strided_steps(length, num_streams)
        assert steps.unique().tolist() == list(range(num_streams + -(-length // num_streams) - 1))
        assert torch.bincount(steps)[:num_streams].tolist() == [1] * num_streams
        heads = [int((steps == head).nonzero()) for head in range(num_streams)]
        assert heads == sorted(heads)
        lengths = torch.tensor([*heads, length]).diff()
        assert lengths.max() - lengths.min() <= 1


@pytest.mark.parametrize("length", [1, 5, 8, 13])
def test_staggered_streams_start_one_step_after_another_and_take_no_more_steps(length):
    for num_streams in range(1, length + 1):
        first, staggered = (orders.strided_steps(length, num_streams, later) for later in (False, True))
        assert staggered.max() <= first.max()
        assert staggered.unique().tolist() == list(range(int(staggered.max()) + 1))
        heads = [int((first == stream).nonzero()) for stream in range(num_streams)]
        for stream, (head, end) in enumerate(zip(heads, [*heads[1:], length], strict=True)):
            assert staggered[head:end].tolist() == list(range(stream, stream + end - head))


@pytest.mark.parametrize("num_streams", [0, -1, 6])
def test_strided_steps_refuse_more_streams_than_positions(num_streams):
    with pytest.raises(ValueError, match="num_streams.*max_new_tokens"):
        orders.strided_steps(5, num_streams)


def test_semi_autoregressive_steps_spread_each_step_over_its_block():
    assert orders.semi_autoregressive_steps(8, 4, 2).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert orders.semi_autoregressive_steps(5, 4, 4).tolist() == [0, 1, 2, 3, 4]
    assert orders.semi_autoregressive_steps(6, 4, 1).tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(("block_length", "steps"), [(0, 1), (4, 0), (4, 5)])
def test_semi_autoregressive_steps_refuse_impossible_blocks(block_length, steps):
    with pytest.raises(ValueError, match="block_length|max_denoising_steps"):
        orders.semi_autoregressive_steps(8, block_length, steps)


def test_block_index_is_the_inverse_of_the_order():
    order = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    assert orders.block_index_from_order(order).tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("order", [[0, 0, 1], [1, 2, 3], [0, 1, -1]])
def test_what_is_not_a_permutation_is_refused(order):
    with pytest.raises(ValueError, match=r"`order` must hold every position 0\.\.2 exactly once"):
        orders.block_index_from_order(torch.tensor([order]))


@pytest.mark.parametrize("blocks", [[0, 2, 1, 4], [1, 2, 3, 1], [-1, 0, 1, 2]])
def test_blocks_with_gaps_are_refused(blocks):
    with pytest.raises(ValueError, match="`block_index` must number the blocks"):
        orders.check_block_index(torch.tensor([[0, 1, 2, 2], blocks]))


def test_block_numbers_of_padding_are_not_looked_at():
    orders.check_block_index(torch.tensor([[9, 0, 1, -5]]), torch.tensor([[False, True, True, False]]))
    with pytest.raises(ValueError):
        orders.check_block_index(torch.tensor([[9, 0, 1, -5]]), torch.tensor([[True, True, True, False]]))


def test_fill_order_puts_given_tokens_first_and_padding_nowhere():
    to_fill = torch.tensor([[False, True, False, True, True, False], [True, True, True, True, False, False]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
    blocks = orders.fill_order(to_fill, attention_mask, lambda count: orders.strided_steps(count, 2))
    assert blocks.tolist() == [[0, 2, 1, 4, 3, -1], [-1, -1, 2, 3, 0, 1]]


@pytest.mark.parametrize("shuffle", [orders.shuffle_subset, orders.shuffle_windows, orders.move_to_random_ranks])
@pytest.mark.parametrize("size", [0, 1, 3, 10, 40])
def test_shuffles_are_permutations(shuffle, size):
    assert shuffle(10, size, generator()).sort().values.tolist() == list(range(10))


def test_subset_shuffle_moves_at_most_the_number_asked_for():
    moved = [int((orders.shuffle_subset(50, 8, generator(seed)) != torch.arange(50)).sum()) for seed in range(50)]
    assert max(moved) <= 8
    # A random permutation has one fixed point on average.
    assert sum(moved) / 50 == pytest.approx(7, abs=0.5)


def test_window_shuffle_stays_inside_its_windows():
    order = orders.shuffle_windows(20, 6, generator())
    assert torch.equal(order // 6, torch.arange(20) // 6)
    assert not torch.equal(order, torch.arange(20))


def test_positions_that_are_not_moved_keep_their_relative_order():
    for seed in range(20):
        order = orders.move_to_random_ranks(30, 3, generator(seed))
        longest = _longest_increasing(order.tolist())
        assert longest >= 27


def _longest_increasing(values):
    best = []
    for index, value in enumerate(values):
        best.append(1 + max((best[j] for j in range(index) if values[j] < value), default=0))
    return max(best)


@pytest.mark.parametrize(
    ("steps", "real", "expected"),
    [
        ([-1, -1, -1, 0, 1, -1, -1], [1] * 7, [0, 3, 4, 5, 6, 1, 2]),  # a gap
        ([-1, -1, 0, -1, 1, -1], [0, 1, 1, 1, 1, 1], [-1, 0, 3, 1, 4, 2]),  # two, after padding
        ([0, 1, -1, -1], [1] * 4, [2, 3, 0, 1]),  # nothing in front
        ([-1, -1, -1, 0, 1], [1] * 5, [0, 1, 2, 3, 4]),  # nothing behind
    ],
)
def test_given_text_behind_a_gap_first(steps, real, expected):
    block_index = orders.after_given(torch.tensor([steps]), torch.tensor([real]).bool(), suffix_first=True)
    assert block_index.tolist() == [expected]
