"""Generation over tensor-parallel ranks: the tokens of one process, on every rank."""

import pytest
import tp_jobs
from pool import run


@pytest.mark.parametrize(
    ("kind", "tp", "tied", "adapted"),
    [("vlm", 2, False, False), ("text", 4, True, False), ("text", 2, False, True)],
    ids=["images", "tied, four ranks", "adapters"],
)
def test_every_rank_has_the_tokens_of_one_process(kind, tp, tied, adapted):
    for found in run(tp, tp_jobs.generated, kind, tp, tied, adapted):
        assert found["many"] == found["one"] and found["many sampled"] == found["one sampled"]
        assert found["many fused"] == found["one fused"] == (not adapted)


def test_weights_over_data_parallel_ranks_are_refused():
    assert all("2 data-parallel ranks" in message for message in run(2, tp_jobs.refusal))
