"""The Pixtral vision tower and the projector: all images of a batch as one row of patches, attention within each image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from m3kernels.models.ministral3.config import VisionConfig
from m3kernels.models.ministral3.layers import MLP, Constant, Linear, RMSNorm, SequenceAttention, Sequences, rotate
from m3kernels.models.ministral3.recompute import RUN
from m3kernels.ops import rotary_2d_table
from m3kernels.parallel import local

# P patches of all images, D hidden, H heads, K head_dim, N image tokens after merging
EPS = 1e-5

Grids = tuple[tuple[int, int], ...]  # rows and columns of patches of each image


class VisionAttention(nn.Module):
    """Attention within each image, with rotary positions of row and column."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.core = SequenceAttention(causal=False, dropout=config.attention_dropout)
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(width, width, bias=False)
        self.v_proj = Linear(width, width, bias=False)
        self.o_proj = Linear(width, width, bias=False)

    def forward(self, x_PD: Tensor, table_PK: Tensor, images: Sequences) -> Tensor:
        heads = (-1, self.config.head_dim)
        q_PHK = rotate(self.q_proj(x_PD).unflatten(-1, heads), table_PK)
        k_PHK = rotate(self.k_proj(x_PD).unflatten(-1, heads), table_PK)
        v_PHK = self.v_proj(x_PD).unflatten(-1, heads)

        return self.o_proj(self.core(q_PHK, k_PHK, v_PHK, images).flatten(1))


class VisionLayer(nn.Module):
    """Attention and MLP, as in the language model but for the names."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, EPS)
        self.attention = VisionAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, EPS)
        self.feed_forward = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x_PD: Tensor, table_PK: Tensor, images: Sequences) -> Tensor:
        h_PD, x_PD = self.attention_norm(x_PD)
        h_PD, x_PD = self.ffn_norm(self.attention(h_PD, table_PK, images), x_PD)
        return x_PD + self.feed_forward(h_PD)


class VisionTransformer(nn.Module):
    """The layers; a module of its own for the sake of transformers' names."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))


class VisionTower(nn.Module):
    """Pixtral: images of any size to features of each patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        shape = (config.num_channels, config.hidden_size, config.patch_size)
        self.patch_conv = PatchEmbedding(*shape)
        self.ln_pre = RMSNorm(config.hidden_size, EPS)
        self.transformer = VisionTransformer(config)
        self.recompute = "none"  # of every layer; see recompute.RUN
        self.inv_freq = Constant(config.inv_freq())

    def forward(self, pixels: Tensor, grids: Grids) -> Tensor:
        """(images, channels, height, width), each padded below and to the right, to (P, D)."""
        # a frozen tower is run as in inference: its ops need not look for what a backward would want
        recorded = pixels.requires_grad or any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(recorded and torch.is_grad_enabled()):
            return self.features(pixels, grids)

    def features(self, pixels: Tensor, grids: Grids) -> Tensor:
        x_PD, _ = self.ln_pre(self.patch_conv(pixels, grids))
        table_PK = rotary_2d_table(self.inv_freq.on(x_PD.device), places(grids, x_PD.device))
        lengths = tuple(rows * columns for rows, columns in grids)
        images = Sequences(lengths, (-1,) * len(grids), x_PD.device)
        run = RUN[self.recompute if torch.is_grad_enabled() else "none"]
        for layer in self.transformer.layers[: self.config.feature_layer]:
            x_PD = run(layer, x_PD, table_PK, images)
        return x_PD


class PatchEmbedding(nn.Conv2d):
    """A convolution whose stride is its size, as one matrix product over the patches that are there."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__(channels, width, kernel_size=patch, stride=patch, bias=False)

    def forward(self, pixels: Tensor, grids: Grids) -> Tensor:
        patch, weight = self.kernel_size[0], local(self.weight)
        patches = [
            image[:, : rows * patch, : columns * patch]
            .unflatten(2, (columns, patch))
            .unflatten(1, (rows, patch))
            .permute(1, 3, 0, 2, 4)
            .flatten(2)
            .flatten(0, 1)
            for image, (rows, columns) in zip(pixels.to(weight.dtype), grids)
        ]
        return F.linear(torch.cat(patches), weight.flatten(1))


def places(grids: Grids, device: torch.device) -> Tensor:
    """(P, 2): row and column of each patch in its image."""
    each = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2) for rows, columns in grids]
    return torch.cat(each).to(device, non_blocking=True)


class PatchMerger(nn.Module):
    """Squares of neighbouring patches to one token each."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.size = config.spatial_merge_size
        self.merging_layer = Linear(config.hidden_size * self.size**2, config.hidden_size, bias=False)

    def forward(self, x_PD: Tensor, grids: Grids) -> Tensor:
        size = self.size
        merged = []
        for image, (rows, columns) in zip(x_PD.split([rows * columns for rows, columns in grids]), grids):
            grid = image.view(rows, columns, -1)[: rows // size * size, : columns // size * size]
            # channels outermost in a token, as torch's unfold has it
            squares = grid.unflatten(1, (-1, size)).unflatten(0, (-1, size)).permute(0, 2, 4, 1, 3)
            merged.append(squares.flatten(2).flatten(0, 1))
        return self.merging_layer(torch.cat(merged))


class Projector(nn.Module):
    """Features of patches to embeddings of image tokens."""

    def __init__(self, config: VisionConfig, text_width: int):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.projector_eps)
        self.patch_merger = PatchMerger(config)
        self.linear_1 = Linear(config.hidden_size, text_width, bias=config.projector_bias)
        self.act = ACT2FN[config.projector_act]
        self.linear_2 = Linear(text_width, text_width, bias=config.projector_bias)

    def forward(self, x_PD: Tensor, grids: Grids) -> Tensor:
        """(N, D of the text)."""
        x_ND = self.patch_merger(self.norm(x_PD)[0], grids)
        return self.linear_2(self.act(self.linear_1(x_ND)))


def grids_of(pixels: Tensor, image_sizes: Tensor | Sequence | None, config: VisionConfig) -> Grids:
    """Rows and columns of patches of each image.

    Args:
        pixels: (images, channels, height, width).
        image_sizes: (images, 2) heights and widths in pixels; None: as large as ``pixels``.

    Raises:
        ValueError: sizes of another number of images, beyond ``pixels``, or smaller than one image token.
    """
    if image_sizes is None:
        sizes = [list(pixels.shape[-2:])] * len(pixels)
    else:
        sizes = [list(map(int, s)) for s in (image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes)]
    if len(sizes) != len(pixels):
        raise ValueError(f"image_sizes has {len(sizes)} images, pixel_values {len(pixels)}")
    token = config.patch_size * config.spatial_merge_size
    for height, width in sizes:
        if height > pixels.shape[-2] or width > pixels.shape[-1] or min(height, width) < token:
            raise ValueError(
                f"an image of {height} x {width} pixels; allowed: at least {token} x {token}, and at most the "
                f"{pixels.shape[-2]} x {pixels.shape[-1]} of pixel_values"
            )
    return tuple((height // config.patch_size, width // config.patch_size) for height, width in sizes)
