"""Masters, moments, stochastic rounding."""

import pytest
import torch
from torch import nn

from m3kernels.models.finetune.adamw_stochastic import StochasticAdamW, round_stochastically
from m3kernels.models.finetune.config import FinetuneError, OptimizerConfig
from m3kernels.models.finetune.optimizer import make_optimizer, set_learning_rate, set_step, with_masters

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1)


def layer(dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 6).to(dtype)


def test_masters_take_the_gradients_of_several_backwards():
    made = layer()
    trained = with_masters(dict(made.named_parameters()), torch.bfloat16)
    assert made.weight.dtype == torch.bfloat16 and trained.masters["weight"].dtype == torch.float32
    # a thousand small gradients: a bf16 sum stops growing at 256 of them
    for _ in range(1000):
        (made.weight * 2.0**-8).sum().backward()
    assert made.weight.grad is None
    torch.testing.assert_close(trained.masters["weight"].grad, torch.full((6, 8), 1000 * 2.0**-8), rtol=0, atol=0)


def test_masters_are_stepped_and_written_back():
    made, alone = layer(), layer()
    trained = with_masters(dict(made.named_parameters()), torch.bfloat16)
    optimizer = make_optimizer(trained, CONFIG, stochastic=False, seed=0)
    other = torch.optim.AdamW(
        [{"params": [alone.weight]}, {"params": [alone.bias], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1,
    )  # fmt: skip
    for _ in range(5):
        for name, p in alone.named_parameters():
            p.grad = torch.randn_like(p)
            trained.masters[name].grad = p.grad.clone()
        optimizer.step()
        other.step()
        trained.write_back()
    for name, p in alone.named_parameters():
        torch.testing.assert_close(trained.masters[name].data, p.data, rtol=0, atol=0)
        assert torch.equal(dict(made.named_parameters())[name], p.to(torch.bfloat16))


def test_moments_are_there_before_a_step_and_gradients_where_none_came():
    trained = with_masters(dict(layer().named_parameters()), None)
    optimizer = make_optimizer(trained, CONFIG, stochastic=False, seed=0)
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in trained.masters.values())
    trained.fill_gradients()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in trained.masters.values())
    set_step(optimizer, 7)
    set_learning_rate(optimizer, 0.5)
    assert all(float(state["step"]) == 7 for state in optimizer.state.values())
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)


def test_vectors_do_not_decay():
    trained = with_masters(dict(layer().named_parameters()), None)
    groups = make_optimizer(trained, CONFIG, stochastic=False, seed=0).param_groups
    assert {p.dim(): g["weight_decay"] for g in groups for p in g["params"]} == {2: 0.1, 1: 0.0}


def test_eight_bit_says_what_it_needs():
    trained = with_masters(dict(layer().named_parameters()), None)
    with pytest.raises(FinetuneError, match="take adamw"):
        make_optimizer(trained, OptimizerConfig(name="adamw_8bit"), stochastic=False, seed=0)


def test_stochastic_rounding_is_right_on_average():
    generator = torch.Generator().manual_seed(0)
    # a third of the way from 1 to the next bf16 number, and below 0
    low, high = 1.0, 1.0 + 2.0**-7
    x = torch.full((200_000,), low + (high - low) / 3)
    for sign in (1, -1):
        rounded = round_stochastically(sign * x, generator).float() * sign
        assert set(rounded.tolist()) == {low, high}
        assert (rounded == high).float().mean() == pytest.approx(1 / 3, abs=0.01)
    exact = torch.tensor([1.0, -2.5, 0.0])
    assert torch.equal(round_stochastically(exact, generator).float(), exact)
    odd = round_stochastically(torch.tensor([float("inf"), -float("inf"), float("nan")]), generator)
    assert odd[0] == float("inf") and odd[1] == -float("inf") and odd[2].isnan()


def test_small_updates_are_lost_by_rounding_and_not_stochastically():
    def moved(make) -> float:
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = make([p])
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return float(1 - p.float().mean())

    # 100 steps of 1e-4 from 1: half a bf16 step is 2e-3
    options = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    assert moved(lambda ps: torch.optim.AdamW(ps, **options)) == 0
    assert moved(lambda ps: StochasticAdamW(ps, **options)) == pytest.approx(1e-2, rel=0.05)


def test_stochastic_adamw_in_fp32_is_adamw():
    one, two = layer(), layer()
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    first, second = StochasticAdamW(one.parameters(), **options), torch.optim.AdamW(two.parameters(), **options)
    for _ in range(4):
        for p, q in zip(one.parameters(), two.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_stochastic_steps_draw_the_same_again():
    def run(steps_before: int) -> torch.Tensor:
        p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = StochasticAdamW([p], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, seed=3)
        for state in optimizer.state.values():
            state["step"].fill_(steps_before)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return p.detach()

    assert torch.equal(run(4), run(4)) and not torch.equal(run(4), run(5))
