"""What is gathered, when, and what is not: FSDP2's units, frozen weights, and gradients of sharded parameters."""

import fsdp_jobs as jobs
import pytest
import torch
from pool import run

from models import FP64, assert_same


@pytest.mark.parametrize("dora, tp, dp", [(False, 1, 2), (True, 2, 2)])
def test_frozen_weights_may_stay_whole_on_every_rank(dora, tp, dp):
    for want, seen, over_batch in run(tp * dp, jobs.frozen_whole, dora, tp, dp):
        assert_same(seen, want, FP64)
        assert over_batch and all(".lora_" in name for name in over_batch)


def test_layers_that_are_not_resharded_are_gathered_once_a_step():
    for reshard, a_step in ((True, 2), (False, 1)):
        for want, seen, gathers, units in run(2, jobs.gathered_once, 2, reshard):
            assert_same(seen, want, FP64)
            assert gathers == 3 * a_step * units and units == 5


def test_a_layer_is_gathered_before_the_one_in_front_of_it_runs():
    for told in run(2, jobs.order_of_a_forward, 2):
        layers = ["v0", "v1", "0", "1"]
        assert [word for word in told if word.startswith("run")] == [f"run {name}" for name in layers]
        for layer, following in zip(layers, layers[1:]):
            assert told.index(f"gather {following}") < told.index(f"run {layer}")
            # and not all at once: of the layers after that one nothing is there yet
            assert told.index(f"run {layer}") < told.index(f"run {following}")
        assert told.index("gather 1") > told.index("run v0")


def test_gradients_of_local_parts_are_as_their_parameters():
    rows = torch.arange(24.0, dtype=torch.float64).view(4, 6)
    ranks = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for found in run(2, jobs.gradients_of_local, 2):
        (kind, _, same, split), whole = found["split"], found["whole"]
        assert kind is torch.Tensor and same and whole[2]
        # each rank's factor, in its own rows; of what is whole the sum of all
        assert torch.equal(split, 3 * rows * ranks.repeat_interleave(2)[:, None])
        assert torch.equal(whole[3], 3 * rows * ranks.sum())
        assert found["split is contiguous"] and found["whole is contiguous"] and not found["frozen"]
        assert "once_differentiable" in found["twice"]
