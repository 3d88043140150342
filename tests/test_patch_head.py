"""An adapter on ``lm_head``: inside the fused loss where that can be, with a reason where it cannot."""

import logging

import pytest
import torch
from test_patch_peft import disturb, lora, pair_with, wrap
from torch import nn

from m3kernels import patch, unpatch
from m3kernels.patching import classes, loss
from models import FP32, assert_error_at_most_eagers, assert_parity, assert_same, batch_for, build, text_batch

HEAD = lora(target_modules=["lm_head", "q_proj"])
ORDERS = ["before", "after"]


@pytest.fixture
def calls(monkeypatch):
    """How many adapters each fused loss takes."""
    seen = []
    real = loss.linear_cross_entropy

    def counting(*args, **options):
        seen.append(len(options.get("adapters", ())))
        return real(*args, **options)

    monkeypatch.setattr(loss, "linear_cross_entropy", counting)
    monkeypatch.setattr(classes, "_noted", set())
    return seen


def heads(config, kind, order, device, **options):
    plain, ours = pair_with(config, kind, order, device, **options)
    disturb(plain), disturb(ours)
    return plain, ours


def layer_of(model):
    return model.base_model.model.lm_head


def loss_of(model, batch, **options):
    output = model.train()(**batch, **options)
    assert output.logits is None or "labels" not in batch
    return output.loss


@pytest.mark.parametrize("order", ORDERS)
def test_the_loss_takes_the_adapter(order, kind, device, calls):
    plain, ours = heads(HEAD, kind, order, device)
    assert_parity(ours, plain, batch_for(plain))
    assert calls == [1] and ours.train()(**batch_for(ours)).logits is None


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"r": 1}, {"lora_alpha": 3, "r": 17}], ids=str)
def test_rank_and_scaling(changes, order, device, calls):
    plain, ours = heads(lora(target_modules=["lm_head"], **changes), "text", order, device)
    assert_parity(ours, plain, text_batch(plain, padding="left"))
    assert calls == [1]


def test_a_tied_head(device, calls):
    plain, ours = heads(lora(target_modules=["lm_head"]), "text", "after", device, tie_word_embeddings=True)
    assert_parity(ours, plain, text_batch(plain))
    assert calls == [1]


def test_num_items_in_batch(device, calls):
    plain, ours = heads(HEAD, "text", "after", device)
    batch = text_batch(plain)
    ours_loss, plain_loss = (model.train()(**batch, num_items_in_batch=7).loss for model in (ours, plain))
    torch.testing.assert_close(ours_loss, plain_loss, rtol=FP32, atol=0)
    assert calls == [1]


@pytest.mark.parametrize("order", ORDERS)
def test_active_adapters(order, device, calls):
    plain, ours = heads(HEAD, "text", order, device)
    batch = text_batch(plain)
    for model in (plain, ours):
        torch.manual_seed(6)
        model.add_adapter("second", lora(target_modules=["lm_head"], r=7, lora_alpha=3))
        model.add_adapter("elsewhere", lora(target_modules=["q_proj"]))
    for names in ("second", "default", "elsewhere", ["default", "second"], ["second", "elsewhere"]):
        for model in (plain, ours):
            model.base_model.set_adapter(names)
            disturb(model)
        calls.clear()
        assert_parity(ours, plain, batch)
        names = [names] if isinstance(names, str) else names
        assert calls == [len(set(names) - {"elsewhere"})], names


@pytest.mark.parametrize("order", ORDERS)
def test_switched_off_and_merged(order, device, calls, caplog):
    plain, ours = heads(HEAD, "text", order, device)
    batch, base = text_batch(plain), build(device=device)
    with ours.disable_adapter():
        assert_same({"loss": loss_of(ours, batch)}, {"loss": loss_of_plain(base, batch)}, FP32)
    ours.merge_adapter(), plain.merge_adapter()
    assert_same({"loss": loss_of(ours, batch)}, {"loss": loss_of_plain(plain, batch)}, FP32)
    assert calls == [0, 0]
    # PEFT unmerges a layer that is called while disabled
    with caplog.at_level(logging.WARNING, "m3kernels"), ours.disable_adapter():
        assert_same({"loss": ours(**batch).loss}, {"loss": loss_of_plain(base, batch)}, FP32)
    assert "merged and disabled" in caplog.text
    plain.unmerge_adapter()
    assert_parity(ours, plain, batch)
    assert calls == [0, 0, 1]
    ours, plain = ours.merge_and_unload(), plain.merge_and_unload()
    ours.requires_grad_(True), plain.requires_grad_(True)
    assert_parity(ours, plain, batch)
    assert type(ours.lm_head).__name__ == "Linear" and calls == [0, 0, 1, 0]


def loss_of_plain(model, batch):
    return model.train()(**batch).loss


def bias(model):
    layer = layer_of(model).lora_B["default"]
    layer.bias = nn.Parameter(torch.ones(layer.out_features, device=layer.weight.device))


UNFUSED = {
    "DoRA or another variant": (lora(target_modules=["lm_head"], use_dora=True), lambda model: None),
    "dropout before": (lora(target_modules=["lm_head"], lora_dropout=0.3), lambda model: None),
    "has a bias": (HEAD, bias),
    "PEFT layer has hooks": (HEAD, lambda model: layer_of(model).register_forward_hook(lambda *_: None)),
    "hooks on the base": (HEAD, lambda model: layer_of(model).base_layer.register_forward_hook(lambda *_: None)),
    "its adapter torch.float16": (HEAD, lambda model: layer_of(model).lora_A.half() and layer_of(model).lora_B.half()),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reason", UNFUSED)
def test_what_cannot_be_fused_says_why(reason, order, device, calls, caplog):
    config, change = UNFUSED[reason]
    plain, ours = heads(config, "text", "before", device)
    change(plain), change(ours)
    if order == "after":
        unpatch(ours)
        report = patch(ours)
        assert report.patched["linear_cross_entropy"] == 0
        (skip,) = [s for s in report.skipped if s.op == "linear_cross_entropy"]
        assert reason in skip.reason
    batch, losses = text_batch(plain), []
    with caplog.at_level(logging.WARNING, "m3kernels"):
        for model in (ours, plain):
            torch.manual_seed(0)
            losses.append(loss_of_plain(model, batch))
    assert calls == [] and (order == "after" or reason in caplog.text), caplog.text
    if reason == "dropout before" and device == "cuda" and order == "after":
        # the head's layer itself runs fused then, and draws another mask of the same distribution than PEFT
        assert all(loss.isfinite() for loss in losses)
        ours.eval(), plain.eval()
        losses = [model(**batch).loss for model in (ours, plain)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


WRONG = {
    "scaling twice": lambda layer: layer.scaling.update(default=layer.scaling["default"] ** 2),
    "one row of B shifted": lambda layer: layer.lora_B["default"].weight.data.copy_(
        layer.lora_B["default"].weight.data.roll(1, 0)
    ),
    "adapter dropped": lambda layer: layer.scaling.update(default=0.0),
    "adapter merged as well": lambda layer: layer.base_layer.weight.data.add_(layer.get_delta_weight("default")),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_adapter_is_noticed(wrong, calls):
    plain, ours = heads(HEAD, "text", "after", "cpu")
    WRONG[wrong](layer_of(ours))
    ours_loss, plain_loss = (loss_of_plain(model, text_batch(plain)) for model in (ours, plain))
    assert abs(ours_loss - plain_loss) > 100 * FP32 * plain_loss and calls == [1]


def test_five_steps_move_as_pefts(device, calls):
    plain, ours = heads(HEAD, "text", "before", device)
    batch, losses = text_batch(plain), []
    for model in (plain, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            loss = loss_of_plain(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[5:] == pytest.approx(losses[:5], rel=10 * FP32) and losses[4] < losses[0]
    assert calls == [1] * 5


@pytest.mark.parametrize("order", ORDERS)
def test_fp32_adapters_of_a_bf16_model(order, device):
    """On a CPU the op's reference, on a GPU the chunks."""
    plain, ours = heads(lora(target_modules=["lm_head"]), "text", order, device, dtype=torch.bfloat16)
    assert_error_at_most_eagers(ours, plain)


def test_autocast(device, calls):
    plain, ours = heads(lora(target_modules=["lm_head"]), "text", "after", device)
    with torch.autocast(device, torch.bfloat16):
        ours_loss, plain_loss = (loss_of_plain(model, text_batch(plain)) for model in (ours, plain))
    torch.testing.assert_close(ours_loss, plain_loss, rtol=1e-2, atol=0)
    assert calls == [1]


def test_compiled(device, calls):
    plain, ours = heads(HEAD, "text", "before", device)
    torch._dynamo.reset()
    ours.train(), plain.train()
    torch.compile(ours, backend="aot_eager")(**text_batch(plain), use_cache=False).loss.backward()
    plain(**text_batch(plain)).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("order", ORDERS)
def test_the_way_back(order, device):
    plain, ours = heads(HEAD, "text", order, device)
    unpatch(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert_parity(ours, plain, text_batch(plain), 0.0)


def test_a_resized_vocabulary_keeps_the_loss_fused(device, calls):
    """PEFT makes a new layer around a head that was replaced before it came."""
    plain, ours = build(device=device), build(device=device)
    patch(ours)
    for model in (plain, ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(160, mean_resizing=False)
    plain, ours = wrap(plain, HEAD), wrap(ours, HEAD)
    batch = text_batch(plain)
    torch.testing.assert_close(loss_of_plain(ours, batch), loss_of_plain(plain, batch), rtol=1e-4, atol=0)
    assert calls == [1]
