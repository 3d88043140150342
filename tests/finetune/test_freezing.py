"""Freeze flags with and without adapters: what is trained, and that PEFT reads what is left."""

import pytest
import runs
import torch
from peft import PeftModel
from pool import run
from transformers import Mistral3ForConditionalGeneration

from m3kernels.models.finetune.build import PARTS, model_on_meta, open_checkpoint, part_of_name
from m3kernels.models.finetune.config import FinetuneError
from m3kernels.models.ministral3.merging import is_adapter

TEXT, VISION, PROJECTOR = PARTS
# scheme, flags, parts that are trained whole, parts with adapters
TRAINED = [
    ("none", "", {TEXT, VISION, PROJECTOR}, set()),
    ("none", "--freeze-language-model", {VISION, PROJECTOR}, set()),
    ("none", "--freeze-vision-model --freeze-vision-projection", {TEXT}, set()),
    ("none", "--freeze-language-model --freeze-vision-model", {PROJECTOR}, set()),
    ("lora", "", set(), {TEXT}),
    ("lora", "--no-freeze-vision-projection", {PROJECTOR}, {TEXT}),
    ("dora", "--no-freeze-vision-model --no-freeze-vision-projection", {VISION, PROJECTOR}, {TEXT}),
    ("lora", "--freeze-language-model --no-freeze-vision-projection", {PROJECTOR}, set()),
    ("lora", "peft.adapt_vision=True peft.adapt_projector=True", set(), {TEXT, VISION, PROJECTOR}),
    ("dora", "peft.adapt_vision=True --freeze-language-model", set(), {VISION}),
    ("lora", "--no-freeze-language-model", set(), {TEXT}),
]


@pytest.mark.parametrize("scheme, flags, whole, adapted", TRAINED)
def test_what_is_trained(checkpoint, tmp_path, scheme, flags, whole, adapted):
    model = model_on_meta(
        runs.config(checkpoint, tmp_path, flags, scheme=scheme), open_checkpoint_of(checkpoint, tmp_path)
    )
    everything = dict(model.named_parameters())
    for part in PARTS:
        plain = [p for name, p in everything.items() if part_of_name(name) == part and not is_adapter(name)]
        adapters = [p for name, p in everything.items() if part_of_name(name) == part and is_adapter(name)]
        count = sum(p.numel() for p in plain if p.requires_grad)
        assert count == (sum(p.numel() for p in plain) if part in whole else 0)
        assert bool(adapters) == (part in adapted) and all(p.requires_grad for p in adapters)


def open_checkpoint_of(checkpoint, folder):
    return open_checkpoint(runs.config(checkpoint, folder))


@pytest.mark.parametrize(
    "scheme, flags, said",
    [
        ("none", "--freeze-language-model --freeze-vision-model --freeze-vision-projection", "nothing is trained"),
        ("lora", "--freeze-language-model", "nothing is trained"),
        ("lora", "peft.adapt_text=False", "nothing is trained"),
        ("lora", "peft.adapt_vision=True --freeze-vision-model", "exclude each other"),
    ],
)
def test_what_cannot_be_trained(checkpoint, tmp_path, scheme, flags, said):
    with pytest.raises(FinetuneError, match=said):
        runs.run(runs.config(checkpoint, tmp_path, flags, scheme=scheme))


@pytest.mark.parametrize("scheme, ranks", [("lora", 1), ("dora", 2)])
def test_peft_reads_adapters_and_a_whole_projector(checkpoint, tmp_path, scheme, ranks):
    options = "--no-freeze-vision-projection train.precision=fp32 checkpoint.merge_adapter=True"
    made = runs.config(checkpoint, tmp_path, options, scheme=scheme)
    run(ranks, runs.run, made)
    folder = runs.folder_of(made)
    base = Mistral3ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    merged = Mistral3ForConditionalGeneration.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    torch.manual_seed(0)
    inputs = image_and_text()
    with torch.no_grad():
        before, wanted = base(**inputs).logits, merged(**inputs).logits
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
        found = model(**inputs).logits
    assert (wanted - before).norm() > 1e-2 * before.norm()
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    (kept,) = model.peft_config["default"].modules_to_save
    assert kept.endswith("multi_modal_projector")
    # the projector's part in it is seen
    original = merged.model.multi_modal_projector.state_dict()
    pretrained = Mistral3ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    assert any(
        (original[n] - x).abs().max() > 1e-3 for n, x in pretrained.model.multi_modal_projector.state_dict().items()
    )


def image_and_text() -> dict:
    """An image of two by three merged patches, then text."""
    row = [10, 10, 10, 12]
    ids = [1, 3, *row, *row[:3], 13, 1100, 1065, 4, 1116, 1101]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.randn(1, 3, 56, 84),
        "image_sizes": torch.tensor([[56, 84]]),
    }
