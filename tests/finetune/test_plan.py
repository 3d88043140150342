"""Steps of a run: each sample once an epoch, the same samples for all layouts, bad records replaced by known ones."""

from collections import Counter

import numpy as np
import pytest
import torch
from data_fakes import EOS, IMAGE, FakeEncoder, FakeSource, FakeStream, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st

from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.finetune.data.order import candidate, permutation
from m3kernels.models.finetune.data.plan import BadRecords, Plan

LENGTHS = [3 + (7 * i) % 23 for i in range(50)]


def make_plan(source=None, encoder=None, **options) -> Plan:
    options = {"seed": 5, "global_batch_size": 8, "seq_length": 32, **options}
    return Plan(source or FakeSource(LENGTHS), encoder or FakeEncoder(), **options)


def all_ranks(plan: Plan, step: int, ranks: int) -> list:
    return [plan.batch(step, rank, ranks) for rank in range(ranks)]


def samples_of(plan: Plan, step: int, ranks: int) -> list[int]:
    return sorted(i for batch in all_ranks(plan, step, ranks) for i in ids_of(batch))


def test_the_order_is_written_down():
    """A resumed run must go on with the same samples under any numpy: these may never change."""
    assert permutation(1234, 0, 8).tolist() == [5, 7, 6, 1, 4, 3, 0, 2]
    assert permutation(1234, 1, 8).tolist() != permutation(1234, 0, 8).tolist()
    assert permutation(1235, 0, 8).tolist() != permutation(1234, 0, 8).tolist()
    assert [candidate(1234, 0, 3, attempt, 100) for attempt in (1, 2, 3)] == [63, 27, 21]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**70), st.booleans())
def test_every_epoch_sees_every_sample_once(count, size, seed, shuffle):
    plan = make_plan(FakeSource([1] * count), seed=seed, global_batch_size=size, shuffle=shuffle)
    epochs = 3
    seen = [i for step in range(-(-epochs * count // size)) for i in plan.indices(step)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    if not shuffle:
        assert seen == [n % count for n in range(len(seen))]
    assert plan.steps_per_epoch == -(-count // size)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 20), st.integers(1, 5), st.booleans(), st.integers(1, 4))
def test_ranks_and_packing_change_nothing_but_who_computes(step, ranks, pack, micro_batch_size):
    plan = make_plan(pack=pack, micro_batch_size=micro_batch_size)
    batches = all_ranks(plan, step, ranks)
    assert sorted(i for batch in batches for i in ids_of(batch)) == sorted(plan.indices(step))
    assert len({len(batch.micro_batches) for batch in batches}) == 1
    assert len({batch.agreed for batch in batches}) == 1
    assert sum(batch.tokens for batch in batches) == sum(LENGTHS[i] for i in plan.indices(step))
    alone = make_plan().batch(step, 0, 1)
    assert sum(batch.supervised for batch in batches) == alone.supervised
    if pack:
        assert all(micro.input_ids.numel() <= 32 for batch in batches for micro in batch.micro_batches)


def test_any_step_can_be_asked_for_at_any_time():
    forward, backward = make_plan(), make_plan()
    wanted = [forward.batch(step, 1, 2) for step in range(8)]
    for step in reversed(range(8)):
        found = backward.batch(step, 1, 2)
        assert [micro.samples for micro in found.micro_batches] == [m.samples for m in wanted[step].micro_batches]
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(found.micro_batches, wanted[step].micro_batches))


def test_a_micro_batch_has_the_samples_one_after_the_other():
    source = FakeSource([4, 6], images={1})
    micro = make_plan(source, global_batch_size=2, shuffle=False).batch(0, 0, 1).micro_batches[0]
    assert micro.samples == ("fake:1", "fake:0") and micro.cu_seqlens == (0, 6, 10)
    assert micro.input_ids.tolist() == [IMAGE] + [101] * 5 + [100] * 4
    assert micro.labels.tolist() == [-100] * 3 + [101] * 3 + [-100] * 2 + [100] * 2
    assert micro.supervised == 5 and micro.image_sizes == ((28, 28),)
    inputs = micro.inputs("cpu", torch.bfloat16)
    assert inputs["input_ids"].shape == inputs["labels"].shape == (1, 10)
    assert inputs["pixel_values"].dtype == torch.bfloat16 and inputs["pixel_values"].shape == (1, 3, 28, 28)


def test_the_first_token_of_a_sample_is_never_a_label():
    class Eager(FakeEncoder):
        def encode(self, record, *, seq_length=None):
            encoded = super().encode(record, seq_length=seq_length)
            encoded.supervised[:] = True
            return encoded

    micro = make_plan(FakeSource([2, 3]), Eager(), global_batch_size=2).batch(0, 0, 1).micro_batches[0]
    assert micro.labels.tolist() == [-100, 101, 101, -100, 100] and micro.supervised == 3


def test_images_of_different_sizes_are_padded_at_right_and_bottom():
    class TwoSizes(FakeEncoder):
        def pixels(self, encoded):
            return [np.full((3, 28, 56) if record["id"] else (3, 56, 28), 1.0, np.float32) for record in encoded.images]

    micro = (
        make_plan(FakeSource([2, 2], images={0, 1}), TwoSizes(), global_batch_size=2).batch(0, 0, 1).micro_batches[0]
    )
    assert micro.pixel_values.shape == (2, 3, 56, 56) and micro.pixel_values.dtype == torch.float32
    assert micro.pixel_values[0, :, :56, :28].min() == 1 and micro.pixel_values[0, :, :, 28:].max() == 0
    assert micro.pixel_values[1, :, :28, :56].min() == 1 and micro.pixel_values[1, :, 28:].max() == 0


def test_a_rank_without_samples_gets_a_token_without_a_label():
    batches = all_ranks(make_plan(FakeSource([5]), global_batch_size=1), 0, 3)
    assert [batch.tokens for batch in batches] == [5, 0, 0]
    empty = batches[2].micro_batches[0]
    assert empty.input_ids.tolist() == [EOS] and empty.labels.tolist() == [-100] and empty.cu_seqlens == (0, 1)
    assert (empty.samples, empty.supervised, empty.pixel_values) == ((), 0, None)
    assert batches[2].capacity == 32


def test_each_rank_decodes_its_own_images_alone():
    encoders = [FakeEncoder(), FakeEncoder()]
    source = FakeSource(LENGTHS, images=set(range(50)))
    for rank, encoder in enumerate(encoders):
        batch = make_plan(source, encoder).batch(0, rank, 2)
        assert sorted(encoder.decoded) == sorted(ids_of(batch))
    assert len(encoders[0].decoded) + len(encoders[1].decoded) == 8


def test_samples_that_were_cut_are_counted():
    batches = all_ranks(make_plan(FakeSource([40, 40, 8]), global_batch_size=3), 0, 2)
    assert sum(batch.cut for batch in batches) == 2


@pytest.mark.parametrize("kind", ["refused", "unreadable", "undecodable"])
def test_bad_records_are_replaced_alike_in_every_layout(kind):
    bad = set(range(0, 50, 3))
    source = FakeSource([9] * 50, **{kind: bad})
    wanted = None
    for ranks, pack in ((1, True), (2, True), (4, False)):
        batches = all_ranks(make_plan(source, pack=pack), 2, ranks)
        found = sorted(i for batch in batches for i in ids_of(batch))
        wanted = wanted or found
        assert found == wanted and len(found) == 8 and not bad & set(found)
        # what was bad is told by one rank alone
        told = Counter(where for batch in batches for where, _ in batch.bad)
        assert {int(where.split(":")[1]) for where in told} <= bad
        assert told.total() >= len(bad & set(make_plan(source).indices(2))) > 0
        assert sum(batch.read for batch in batches) == 8 + told.total()


def test_a_replacement_follows_from_seed_epoch_and_index():
    source = FakeSource([9] * 50, unreadable={7})
    plan = make_plan(source)
    for epoch in (0, 1):
        step = next(n for n in range(50) if 7 in plan.indices(n) and n * 8 // 50 == (n * 8 + 7) // 50 == epoch)
        other = sorted(set(samples_of(plan, step, 2)) - set(plan.indices(step)))
        wanted = candidate(5, epoch, 7, 1, 50)
        assert other == [wanted] or wanted in plan.indices(step)


def test_a_replacement_of_an_image_is_not_longer():
    """The bins are made: only what fits into the place of the sample can stand in for it."""
    lengths = [4 if i % 2 else 30 for i in range(50)]
    source = FakeSource(lengths, undecodable={i for i in range(50) if i % 2 and i % 3})
    replaced = 0
    for step in range(12):
        for batch in all_ranks(make_plan(source), step, 2):
            replaced += len(batch.bad)
            assert all(micro.input_ids.numel() <= 32 for micro in batch.micro_batches)
    assert replaced > 10


def test_a_place_without_a_good_candidate_stays_empty():
    source = FakeSource([9] * 50, unreadable=set(range(50)))
    batches = all_ranks(make_plan(source), 0, 2)
    assert all(not micro.samples for batch in batches for micro in batch.micro_batches)
    assert sum(len(batch.bad) for batch in batches) == sum(batch.read for batch in batches) == 8 * 17
    broken = FakeSource([9] * 50, undecodable=set(range(50)))
    batches = all_ranks(make_plan(broken), 0, 2)
    assert sum(len(batch.bad) for batch in batches) == 8 * 17
    assert all(micro.cu_seqlens == (0, 1) for batch in batches for micro in batch.micro_batches)


def test_too_many_bad_records_end_the_run_with_their_list():
    plan = make_plan(FakeSource([9] * 50, unreadable={1, 2}))
    bad = BadRecords()
    for step in range(12):
        bad.add(plan.batch(step, 0, 1))
        if bad.read < 100:
            bad.raise_if_over(0.01)
    assert bad.read >= 100 and set(bad.reasons) == {"fake:1", "fake:2"} and 0.02 < bad.share() < 0.1
    bad.raise_if_over(0.1)
    with pytest.raises(FinetuneError, match=r"(?s)of \d+ records.*fake:[12]: empty answer"):
        bad.raise_if_over(0.01)


def test_ten_bad_records_are_enough_to_judge_and_twenty_are_listed():
    bad = BadRecords()
    bad.add(make_plan(FakeSource([9] * 50, refused=set(range(50)))).batch(0, 0, 1))
    with pytest.raises(FinetuneError, match="and 30 more") as raised:
        bad.add(make_plan(FakeSource([9] * 50, refused=set(range(50))), global_batch_size=50).batch(0, 0, 1))
        bad.raise_if_over(0.5)
    assert str(raised.value).count("no record") == 20


def test_evaluation_sees_each_sample_at_most_once():
    plan = make_plan(FakeSource([9] * 21, unreadable={3}), shuffle=False)
    for ranks in (1, 2):
        seen = [list(plan.eval_batches(32, rank, ranks)) for rank in range(ranks)]
        assert len({len(batches) for batches in seen}) == 1
        assert sorted(i for batches in seen for batch in batches for i in ids_of(batch)) == sorted(set(range(21)) - {3})
    assert [batch.samples for batch in plan.eval_batches(32)] == [8, 8, 5]
    assert [batch.samples for batch in plan.eval_batches(2)] == [8, 8]
    # while training goes over the end and replaces
    assert len(ids_of(plan.batch(2, 0, 1))) == 8


def test_prompts_are_the_first_good_records():
    source = FakeSource([9, 9, 9, 9], unreadable={0}, undecodable={1}, images={2})
    first, second = make_plan(source, shuffle=False).prompts(2)
    assert (first.where, second.where) == ("fake:2", "fake:3")
    assert first.tokens == [IMAGE, 102, 102, 102] and first.answer == "answer 2"
    assert first.pixel_values.shape == (1, 3, 28, 28) and second.pixel_values is None


def test_a_stream_is_read_once_and_resumes_by_skipping():
    stream = FakeStream(FakeSource(LENGTHS, refused={4}))
    plan = make_plan(stream)
    assert plan.steps_per_epoch is None
    seen = [samples_of(plan, step, 1) for step in range(6)]
    assert stream.opened == [0]
    assert seen[1] == list(range(8, 16)) and 4 not in seen[0] and len(seen[0]) == 8
    resumed = make_plan(FakeStream(FakeSource(LENGTHS, refused={4})))
    assert samples_of(resumed, 3, 1) == seen[3]
    assert resumed.source.opened == [24]


def test_a_stream_begins_again_where_it_ends():
    stream = FakeStream(FakeSource([3] * 10))
    plan = make_plan(stream)
    assert [samples_of(plan, step, 1) for step in range(3)] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 8, 9],
        [0, 1, 2, 3, 6, 7, 8, 9],
    ]
    assert stream.opened == [0, 0, 0]
    # a run that resumes in the third epoch does not know the length yet
    resumed = make_plan(FakeStream(FakeSource([3] * 10)))
    assert samples_of(resumed, 2, 1) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert [batch.samples for batch in make_plan(FakeStream(FakeSource([3] * 10))).eval_batches(9)] == [8, 2]
    with pytest.raises(FinetuneError, match="has no records"):
        make_plan(FakeStream(FakeSource([]))).batch(0, 0, 1)


def test_the_fingerprint_is_of_what_decides_on_samples_and_tokens():
    plan = make_plan()
    same = make_plan(pack=False, micro_batch_size=4)
    assert plan.fingerprint == same.fingerprint
    for change in ({"seed": 6}, {"global_batch_size": 4}, {"seq_length": 31}, {"shuffle": False}):
        assert make_plan(**change).fingerprint != plan.fingerprint
    assert make_plan(FakeSource(LENGTHS, fingerprint="other")).fingerprint != plan.fingerprint


@pytest.mark.parametrize(
    "options, message",
    [
        ({"global_batch_size": 0}, "global_batch_size=0; it must be at least 1"),
        ({"seed": -1}, "rng.seed=-1"),
        ({"source": FakeSource([])}, "fake has no records"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(FinetuneError, match=message):
        options = {"source": FakeSource([1]), "seed": 0, "global_batch_size": 1, "seq_length": 8, **options}
        Plan(encoder=FakeEncoder(), **options)
