"""What the decode bench generates: cells, their prompts and their images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3kernels.bench.model_shapes import IMAGE_TOKEN, PAD_TOKEN, SEED, Size, draw_images


@dataclass(frozen=True)
class Cell:
    """``new_tokens`` tokens after a prompt, greedily, for ``batch`` rows of equal length.

    Attributes:
        images: (height, width) in pixels of those in the prompt; without new tokens the tower runs on them.
    """

    size: str
    batch: int
    prompt: int
    new_tokens: int = 64
    quick: bool = False
    images: tuple[tuple[int, int], ...] = ()

    @property
    def label(self) -> str:
        pictures = f" images {len(self.images)}" if self.images else ""
        return f"{self.size} batch {self.batch} prompt {self.prompt}{pictures}"


LARGEST = ((1540, 1540),)
DIFFERENT = ((1540, 1540), (1120, 1540), (980, 1400), (840, 840), (700, 1120), (560, 560), (420, 700), (280, 392))
CELLS: tuple[Cell, ...] = (
    Cell("3b", 1, 512, quick=True),
    Cell("3b", 1, 16384),
    Cell("3b", 16, 512),
    # 55 x 55 tokens of the image, and text
    Cell("3b", 1, 3100, new_tokens=64, images=LARGEST),
    Cell("3b", 1, 0, new_tokens=0, images=DIFFERENT),
    Cell("8b", 1, 512),
    Cell("8b", 1, 16384),
    Cell("8b", 16, 512),
    Cell("14b", 1, 512),
    Cell("14b", 1, 16384),
    Cell("14b", 16, 512),
)


def make_tokens(cell: Cell, size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts (batch, prompt) and the tokens forced after them (new_tokens, batch)."""
    g = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(PAD_TOKEN + 1, size.vocab, (cell.batch, cell.prompt), generator=g)
    count = sum(h * w for h, w in cell.images) // (size.vision.patch * size.vision.merge) ** 2
    if cell.new_tokens:
        prompt[:, 1 : 1 + count] = IMAGE_TOKEN
    forced = torch.randint(PAD_TOKEN + 1, size.vocab, (cell.new_tokens, cell.batch), generator=g)
    return prompt.to(device), forced.to(device)


def make_images(cell: Cell, device: torch.device) -> dict[str, Tensor]:
    """``pixel_values`` and ``image_sizes`` of a cell with images."""
    if not cell.images:
        return {}
    made = draw_images(cell.images, torch.Generator().manual_seed(SEED))
    return {name: t.to(device) for name, t in made.items()}
