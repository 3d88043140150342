"""Masters and their gradients, moments, stochastic rounding, clipping."""

import pytest
import torch
from torch import nn

from m3kernels.models.finetune.adamw import FusedAdamW
from m3kernels.models.finetune.config import FinetuneError, OptimizerConfig
from m3kernels.models.finetune.optimizer import make_optimizer, ready_step, set_learning_rate, set_step, with_masters
from m3kernels.ops.adamw import random_words, round_stochastically

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1)
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


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


@pytest.mark.parametrize("narrow", [True, False])
def test_a_second_backward_begins_the_sum_in_fp32(narrow):
    made = layer()
    trained = with_masters(dict(made.named_parameters()), torch.bfloat16, narrow_gradients=narrow)
    master, seen = trained.masters["weight"], []
    for scale in (1.0, 2.0**-9, 2.0**-9):
        (made.weight * scale).sum().backward()
        seen.append((master.grad.dtype, float(master.grad[0, 0])))
    first = torch.bfloat16 if narrow else torch.float32
    # in bf16 the sum would have stayed 1
    assert seen == [(first, 1.0), (torch.float32, 1 + 2.0**-9), (torch.float32, 1 + 2.0**-8)]
    trained.zero_grad()
    trained.fill_gradients()
    assert master.grad.dtype == first and not master.grad.any()


def test_one_backward_or_its_fp32_gradient_are_the_same_step():
    def stepped(narrow: bool) -> tuple[torch.Tensor, torch.Tensor]:
        made = layer()
        trained = with_masters(dict(made.named_parameters()), torch.bfloat16, narrow_gradients=narrow)
        optimizer = make_optimizer(trained, CONFIG, seed=0)
        for i in range(3):
            torch.manual_seed(i)
            made(torch.randn(5, 8, dtype=torch.bfloat16)).square().sum().backward()
            assert (trained.masters["weight"].grad.dtype == torch.float32) is not narrow
            ready_step(trained, optimizer, trained.gradient_norm(), 1.0)()
            assert all(p.grad is None for p in trained.masters.values())
        return trained.masters["weight"].detach(), made.weight.detach()

    narrow, wide = stepped(True), stepped(False)
    assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1])
    assert torch.equal(narrow[0].bfloat16(), narrow[1])


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e9])
def test_clipping_is_torchs(max_norm):
    one, two = layer(), layer()
    trained = with_masters(dict(one.named_parameters()), None)
    # an eps that counts: Adam is blind to gradients that are scaled as a whole
    optimizer = make_optimizer(trained, OptimizerConfig(lr=1e-2, adam_eps=0.1, weight_decay=0.0), seed=0)
    other = torch.optim.AdamW(two.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=0.1, weight_decay=0.0)
    for i in range(3):
        for p, q in zip(one.parameters(), two.parameters()):
            p.grad = torch.full_like(p, 1.0 + i)
            q.grad = p.grad.clone()
        norm = trained.gradient_norm()
        expected = torch.nn.utils.get_total_norm([q.grad for q in two.parameters()])
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        if max_norm:
            torch.nn.utils.clip_grads_with_norm_(two.parameters(), max_norm, expected)
        ready_step(trained, optimizer, norm, max_norm)()
        other.step()
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    moved = float((one.weight - layer().weight).detach().abs().max())
    # a tenth of the norm of 54 ones, three times: far below lr
    assert (moved < 1e-2) if max_norm == 0.1 else (moved > 2e-2)


def test_masters_are_stepped_and_written_back():
    made, alone = layer(), layer()
    trained = with_masters(dict(made.named_parameters()), torch.bfloat16)
    optimizer = make_optimizer(trained, CONFIG, seed=0)
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
    for name, p in alone.named_parameters():
        torch.testing.assert_close(trained.masters[name].data, p.data, rtol=0, atol=0)
        assert torch.equal(dict(made.named_parameters())[name], p.to(torch.bfloat16))


def test_moments_are_there_before_a_step_and_gradients_where_none_came():
    trained = with_masters(dict(layer().named_parameters()), None)
    optimizer = make_optimizer(trained, CONFIG, seed=0)
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in trained.masters.values())
    trained.fill_gradients()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in trained.masters.values())
    set_step(optimizer, 7)
    set_learning_rate(optimizer, 0.5)
    assert all(float(state["step"]) == 7 for state in optimizer.state.values())
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)


def test_vectors_do_not_decay():
    trained = with_masters(dict(layer().named_parameters()), None)
    groups = make_optimizer(trained, CONFIG, seed=0).param_groups
    assert {p.dim(): g["weight_decay"] for g in groups for p in g["params"]} == {2: 0.1, 1: 0.0}


def test_eight_bit_says_what_it_needs():
    trained = with_masters(dict(layer().named_parameters()), None)
    with pytest.raises(FinetuneError, match="take adamw"):
        make_optimizer(trained, OptimizerConfig(name="adamw_8bit"), seed=0)


def test_stochastic_rounding_is_right_on_average():
    draw = lambda x: random_words(7, 1, 0, 0, len(x), x.device)
    # a third of the way from 1 to the next bf16 number, and below 0
    low, high = 1.0, 1.0 + 2.0**-7
    x = torch.full((200_000,), low + (high - low) / 3)
    for sign in (1, -1):
        rounded = round_stochastically(sign * x, draw(x)).float() * sign
        assert set(rounded.tolist()) == {low, high}
        assert (rounded == high).float().mean() == pytest.approx(1 / 3, abs=0.01)
    exact = torch.tensor([1.0, -2.5, 0.0])
    assert torch.equal(round_stochastically(exact, draw(exact)).float(), exact)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    odd = round_stochastically(odd, draw(odd))
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
    assert moved(lambda ps: FusedAdamW(ps, **options)) == pytest.approx(1e-2, rel=0.05)


def test_twenty_steps_have_the_bits_of_torchs():
    one, two = layer(), layer()
    first, second = FusedAdamW(one.parameters(), **OPTIONS), torch.optim.AdamW(two.parameters(), **OPTIONS)
    for i in range(20):
        for p, q in zip(one.parameters(), two.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if i == 5:  # a parameter without a gradient is left alone, and its steps are counted apart
            one.bias.grad = two.bias.grad = None
        first.step()
        second.step()
    for p, q in zip(one.parameters(), two.parameters()):
        assert torch.equal(p, q)
        assert all(torch.equal(first.state[p][key], second.state[q][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_state_goes_on_with_the_same_bits(dtype):
    def step(made: nn.Module, optimizer: FusedAdamW, seed: int) -> None:
        torch.manual_seed(seed)
        for p in made.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    made, other = layer(dtype), layer(dtype)
    optimizer, resumed = FusedAdamW(made.parameters(), **OPTIONS), FusedAdamW(other.parameters(), **OPTIONS)
    step(made, optimizer, 1)
    other.load_state_dict(made.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(state["exp_avg"].dtype == wide for state in resumed.state.values())
    for trained, by in ((made, optimizer), (other, resumed)):
        step(trained, by, 2)
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), other.parameters()))


def test_what_steps_take_is_said():
    assert "cpu" in FusedAdamW(layer().parameters(), **OPTIONS).backend


def test_stochastic_steps_draw_the_same_again():
    def run(steps_before: int) -> torch.Tensor:
        p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = FusedAdamW([p], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, seed=3)
        for state in optimizer.state.values():
            state["step"].fill_(steps_before)
        p.grad = torch.ones_like(p)
        optimizer.step()
        return p.detach()

    assert torch.equal(run(4), run(4)) and not torch.equal(run(4), run(5))
