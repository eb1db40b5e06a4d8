"""The order curriculum: the schedule's formula at its corners, and orders that depend on seed, step and text alone."""

import pytest
import torch
from torch.utils.data import DataLoader

from hf_diffusion.diffusion import orders
from hf_diffusion.training import CurriculumCallback, OrderCollator, OrderCurriculum


PAPER = {"ramp_start": 9_000, "ramp_end": 48_000, "max_shuffled": 32}


def examples(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(100, (length,), generator=generator)} for length in lengths]


@pytest.mark.parametrize(
    ("step", "shuffled"), [(0, 1), (8_999, 1), (9_000, 1), (28_500, 16), (47_999, 31), (48_000, 32), (180_000, 32)]
)
def test_the_papers_schedule(step, shuffled):
    # Left to right until 9K, from 1 to 32 shuffled tokens until 48K, then constant (OpenWebText, both sizes).
    assert OrderCurriculum(**PAPER).num_shuffled(step) == shuffled


def test_phases_follow_each_other():
    collator = OrderCollator(OrderCurriculum(2, 4, 8, strided_start=6, num_streams=(4,)))
    blocks = [collator(examples(16, 16))["block_index"] for _ in range(8)]
    left_to_right = orders.left_to_right(2, 16)
    assert torch.equal(blocks[0], left_to_right)
    assert torch.equal(blocks[1], left_to_right)
    for shuffled in blocks[4:6]:
        assert not torch.equal(shuffled, left_to_right)
        assert torch.equal(shuffled.sort(-1).values, left_to_right)
        assert int((shuffled != left_to_right).sum(1).max()) <= 8
    for strided in blocks[6:]:
        assert torch.equal(strided, orders.strided_steps(16, 4).expand(2, 16))


def test_the_number_of_streams_is_drawn_for_a_step_and_shared_by_its_texts():
    collator = OrderCollator(OrderCurriculum(strided_start=0, num_streams=(1, 2, 4)))
    seen = set()
    for _ in range(60):
        blocks = collator(examples(8, 8, 8))["block_index"]
        assert bool((blocks == blocks[0]).all())
        seen.add(int(blocks.max()) + 1)
    assert seen == {8, 5}.union({4 + 2 - 1})


def test_two_processes_draw_what_one_draws():
    curriculum = OrderCurriculum(max_shuffled=16)
    whole, first, second = (OrderCollator(curriculum, seed=5) for _ in range(3))
    texts = examples(16, 16, 16, 16)
    for _ in range(3):
        together = whole(texts)["block_index"]
        apart = [first(texts[:2])["block_index"], second(texts[2:])["block_index"]]
        assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(whole(texts)["block_index"], together)


def test_a_resumed_collator_goes_on_where_it_stopped():
    curriculum = OrderCurriculum(0, 30, 16)
    through, resumed = OrderCollator(curriculum, batches_per_step=2), OrderCollator(curriculum, batches_per_step=2)
    batches = [through(examples(16, 16))["block_index"] for _ in range(8)]
    resumed.start_at(step=3)
    assert torch.equal(resumed(examples(16, 16))["block_index"], batches[6])
    assert torch.equal(resumed(examples(16, 16))["block_index"], batches[7])


def test_evaluation_batches_bring_their_order_and_do_not_count():
    collator, undisturbed = (OrderCollator(OrderCurriculum(0, 30, 16)) for _ in range(2))
    backwards = torch.arange(16).flip(0)
    evaluation = [{**example, "block_index": backwards} for example in examples(16, 16)]
    for _ in range(4):
        assert torch.equal(collator(evaluation)["block_index"], backwards.expand(2, 16))
        assert torch.equal(collator(examples(16, 16))["block_index"], undisturbed(examples(16, 16))["block_index"])


def test_workers_share_the_steps_among_them():
    collator = OrderCollator(OrderCurriculum(0, 6, 16))
    texts = examples(*[16] * 12)
    alone = [batch["block_index"] for batch in DataLoader(texts, batch_size=2, collate_fn=collator)]
    collator.start_at(0)
    shared = [batch["block_index"] for batch in DataLoader(texts, batch_size=2, collate_fn=collator, num_workers=2)]
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


def test_the_callback_passes_on_where_training_is():
    class Arguments:
        gradient_accumulation_steps = 4

    class State:
        global_step = 7

    collator = OrderCollator(OrderCurriculum())
    CurriculumCallback(collator).on_epoch_begin(Arguments(), State(), None)
    assert (collator.first_batch, collator.batches, collator.batches_per_step) == (28, 0, 4)


def test_uneven_texts_are_padded_and_padding_does_not_count():
    batch = OrderCollator(OrderCurriculum())(examples(5, 3))
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"][1, 3:].tolist() == [-100, -100]
    assert batch["block_index"][1].tolist() == [0, 1, 2, orders.NEVER, orders.NEVER]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ramp_start": 5, "ramp_end": 2}, "`ramp_start` .5. must be at least 0 and at most `ramp_end`"),
        ({"max_shuffled": 0}, "`max_shuffled` must be at least 1"),
        ({"num_streams": ()}, "`num_streams` must hold positive numbers"),
        ({"shuffle": "all"}, "`shuffle` must be one of"),
    ],
    ids=["ramp", "rho", "streams", "shuffle"],
)
def test_impossible_curricula_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OrderCurriculum(**settings)
