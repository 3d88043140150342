"""The optimizer over ranks: norms of parts, steps of parts, random bits of what several ranks hold."""

import adamw_jobs
import pytest
import torch
from pool import run

LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]


@pytest.mark.parametrize(("ranks", "tp"), LAYOUTS)
def test_the_norm_over_ranks(ranks, tp):
    found = run(ranks, adamw_jobs.norms, tp)
    for ours, theirs, exact, alone in found:
        assert ours == pytest.approx(exact, rel=1e-14) and theirs == pytest.approx(exact, rel=1e-14)
        assert alone != pytest.approx(exact, rel=1e-2)
    # a step that one rank takes and another does not is the end of a run
    assert len({ours for ours, *_ in found}) == 1


@pytest.mark.parametrize(("ranks", "tp"), LAYOUTS)
def test_steps_of_parts_are_torchs(ranks, tp):
    parameters = [p.requires_grad_() for p in adamw_jobs.whole(0)]
    optimizer = torch.optim.AdamW(parameters, **adamw_jobs.OPTIONS)
    for step in range(1, 4):
        for p, g in zip(parameters, adamw_jobs.whole(step)):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    for found in run(ranks, adamw_jobs.steps, tp, torch.float64):
        for a, b in zip(found, parameters):
            torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-14)


def test_what_is_whole_on_all_ranks_stays_equal():
    found = run(4, adamw_jobs.steps, 2, torch.bfloat16)
    exact = run(1, adamw_jobs.steps, 1, torch.float64)[0]
    for tensors in found:
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[0]))
        for a, b in zip(tensors, exact):
            # three steps, each to a neighbour, of numbers up to 4
            torch.testing.assert_close(a.double(), b, rtol=0, atol=4 * 2.0**-7)
