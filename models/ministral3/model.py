"""The whole model: images placed among the tokens, head and loss, and Hugging Face's batches in and out."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.utils import ModelOutput

from m3kernels.models.ministral3 import tokens as packing
from m3kernels.models.ministral3.as_transformers import ModelMethods, options_of_transformers
from m3kernels.models.ministral3.cache import KVCache
from m3kernels.models.ministral3.config import Config, TextConfig
from m3kernels.models.ministral3.layers import Linear, RMSNorm
from m3kernels.models.ministral3.text import LanguageModel
from m3kernels.models.ministral3.tokens import Tokens
from m3kernels.models.ministral3.vision import Grids, Projector, VisionTower, grids_of
from m3kernels.parallel import all_gather_tokens, all_reduce_sum, local, vocab_parallel_linear_cross_entropy

IGNORED = -100


@dataclass
class Output(ModelOutput):
    """What a forward returns.

    Attributes:
        loss: mean cross-entropy of the supervised tokens, over all ranks' batches; None without labels.
        logits: (batch, seq, V), zeros where the input had padding; (T, V) for packed tokens. None where the loss is
            computed without them.
        cache: keys and values, to be passed with what comes next; None unless asked for. Also ``past_key_values``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: KVCache | None = None

    @property
    def past_key_values(self) -> KVCache | None:
        return self.cache


class Head(Linear):
    """Hidden states to logits, or straight to the summed loss."""

    computes_loss = False  # the fused forward goes to the loss without logits

    def __init__(self, config: TextConfig):
        super().__init__(config.hidden_size, config.vocab_rows, bias=False)
        self.vocab_size = config.vocab_size
        self.is_plain_linear = config.vocab_rows == config.vocab_size

    def rows(self) -> Tensor:
        """(V, D): the weight without padding; (v, D) of a sharded vocabulary, whose padding the loss knows of."""
        weight_vD = local(self.weight)
        # a slice of all rows would still be a step of the backward
        if self.is_plain_linear or weight_vD.shape[0] < self.out_features:
            return weight_vD
        return weight_vD[: self.vocab_size]

    def forward(self, x_TD: Tensor, labels_T: Tensor | None = None) -> Tensor:
        logits_TV = F.linear(x_TD, self.rows())
        if labels_T is None:
            return logits_TV
        return summed_loss(logits_TV, labels_T)


def computes_loss(head: nn.Module) -> bool:
    return getattr(head, "computes_loss", False)


def summed_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Sum of the cross-entropies of the rows whose label is not -100; in fp32, fp64 for fp64."""
    wide = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(wide, labels_T, ignore_index=IGNORED, reduction="sum")


class Body(nn.Module):
    """Tower, projector and language model under transformers' names."""

    def __init__(self, config: Config):
        super().__init__()
        if config.vision is not None:
            self.vision_tower = VisionTower(config.vision)
            self.multi_modal_projector = Projector(config.vision, config.text.hidden_size)
        self.language_model = LanguageModel(config.text)

    def image_features(self, pixels: Tensor, grids: Grids) -> Tensor:
        """(N, D): embeddings of the image tokens, image after image."""
        return self.multi_modal_projector(self.vision_tower(pixels, grids), grids)


class Ministral3(ModelMethods, nn.Module):
    """Ministral 3 with its vision tower, or the language model alone.

    Parameters have transformers' runtime names (``model.language_model.layers.0.self_attn.q_proj.weight``). Plain PyTorch;
    ``m3kernels.patch(model)`` puts the kernels in, ``parallelize(model, mesh)`` shards it.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = Head(config.text)
        if config.tied:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight
        self.layout = None  # set by parallelize
        self.adapters = None  # the AdapterConfig, set by add_adapters
        self.source: Path | None = None  # the folder that the weights were read from
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        mesh: DeviceMesh | None = None,
        quantize: Literal["fp8", "keep"] | None = None,
        prepare: Callable[["Ministral3"], object] | None = None,
        pad_vocab_to: int = 1,
        progress: bool = False,
        **sharding,
    ) -> "Ministral3":
        """Reads a Hugging Face checkpoint, or a native one: a local folder or a Hub id, in eval mode.

        Args:
            dtype: of the parameters; the checkpoint's own by default. FP8 weights are dequantised but by ``quantize``.
            device: where the parameters go, one after the other.
            mesh: shards the model before a weight is read; each rank then reads its own part alone.
            quantize: for generation, the decoder layers' weights in FP8, their activations as they are: "fp8" makes a scale for
                each output channel, of any checkpoint; "keep" takes an FP8 checkpoint's own weights and scales (what it has
                as ``activation_scale`` is not used). Memory stays near the FP8 size.
            prepare: is called with the model before that, while it is on the meta device: to freeze it, to add adapters or
                to patch it.
            pad_vocab_to: embedding and head get rows of zeros up to a multiple of this, for a ``mesh`` whose tensor
                parallelism does not divide the vocabulary. Neither logits nor ``save_pretrained`` show them.
            progress: whether to show a bar.
            sharding: options of ``parallelize``.

        Raises:
            CheckpointError: nothing is there, or tensors are missing, in excess, misshapen or unreadable.
            ConfigError: the config asks for what this model does not compute.
            QuantizationError: ``quantize`` is another, or does not go with the checkpoint or the mesh.
        """
        from m3kernels.models.ministral3.loading import load
        from m3kernels.models.ministral3.quantized import prepare_quantized
        from m3kernels.models.ministral3.weights import Checkpoint

        checkpoint = Checkpoint.open(source, revision=revision, token=token)
        checkpoint.check()
        config = Config.from_hf(checkpoint.config, tied=checkpoint.tied, pad_vocab_to=pad_vocab_to)
        with torch.device("meta"):
            model = cls(config).to(dtype or checkpoint.float_dtype)
        if quantize is not None:
            prepare_quantized(model, checkpoint, quantize, mesh)
        if prepare is not None:
            prepare(model)
        if mesh is not None:
            from m3kernels.models.ministral3.parallel import parallelize

            parallelize(model, mesh, **sharding)
        load(model, checkpoint, dtype=dtype, device=device, progress=progress)
        model.source = checkpoint.folder
        return model.eval()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws matrices from a normal distribution of ``config.initializer_range``; norms are one, biases and padding zero."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1)
            elif isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
                module.weight.normal_(0, self.config.initializer_range, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        for table in (self.get_input_embeddings(), self.lm_head):
            table.weight[self.config.text.vocab_size :].zero_()

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | Sequence | None = None,
        labels: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        cache: KVCache | None = None,
        use_cache: bool | None = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        skip_logits: bool | None = None,
        return_dict: bool | None = True,
        **options,
    ) -> Output:
        """Hugging Face's batch, or packed tokens.

        Padding is not computed: a label counts where the token before it in its row is one.

        Args:
            input_ids: (batch, seq); or (T,) or (1, T) with ``cu_seqlens``.
            attention_mask: (batch, seq), 0 where there is padding.
            position_ids: like ``input_ids``; see ``tokens.from_rows``.
            pixel_values: (images, channels, height, width), for the image tokens in their order.
            image_sizes: (images, 2), height and width of each image in pixels.
            labels: like ``input_ids``, -100 where nothing is predicted; shifted here, as transformers does.
            inputs_embeds: (*shape of input_ids, D) embeddings instead of ``input_ids``; without images.
            cu_seqlens: (sequences + 1,) boundaries of packed sequences.
            cache: what an earlier forward returned; its tokens are seen, and these are added. No gradients are recorded.
            use_cache: whether to begin a cache where none is given.
            logits_to_keep: the last so many columns, or the columns given; 0 is all.
            num_items_in_batch: what the summed loss is divided by; by default the supervised tokens of all ranks.
            skip_logits: leave logits out where there is a loss; by default in training, where the loss needs none, unless
                ``logits_to_keep`` or ``return_dict=False`` asks for some.
            return_dict: False returns a tuple.
            options: ``shift_labels``, labels that are shifted already, instead of ``labels``; ``past_key_values``, another
                name of ``cache``; ``cu_seq_lens_q``, of ``cu_seqlens``; and what transformers passes on that changes nothing.

        Raises:
            ValueError: inputs of shapes that do not fit together, image tokens without as many features, images for a
                model without a tower, or a cache while gradients are recorded in training.
            TypeError: an option that there is not.
        """
        taken = options_of_transformers(options)
        cache = taken.get("past_key_values") if cache is None else cache
        cu_seqlens = taken.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        group = None if self.layout is None else self.layout.tp_group
        if inputs_embeds is not None:
            if pixel_values is not None or group is not None:
                raise ValueError("inputs_embeds go with neither pixel_values nor tensor parallelism: pass input_ids")
            input_ids = inputs_embeds.new_zeros(inputs_embeds.shape[:-1], dtype=torch.long)
        if cu_seqlens is not None:
            if attention_mask is not None or cache is not None or use_cache:
                raise ValueError("cu_seqlens goes with neither attention_mask nor a cache: packed rows have no padding")
            tokens = packing.from_packed(input_ids, cu_seqlens, position_ids)
        else:
            tokens = packing.from_rows(input_ids, attention_mask, position_ids, cache, use_cache=bool(use_cache))
        if group is not None:
            tokens = tokens.padded_to(group.size())
        if use_cache and cache is None:
            cache = KVCache(input_ids.shape[0], max(tokens.sequences.lengths))
        if cache is not None and torch.is_grad_enabled() and self.training:
            raise ValueError("a cache keeps no gradients: call in eval mode or under torch.no_grad()")

        labels_T = self.labels_of(tokens, labels, taken.get("shift_labels"))
        everything = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if skip_logits is None:
            needless = group is not None or computes_loss(self.lm_head)
            skip_logits = self.training and needless and everything and return_dict is not False
        loss = logits = None
        # keys and values are read back from the cache without one: a gradient of the rest alone would be wrong
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x_tD = self.hidden_states(tokens, pixel_values, image_sizes, cache, group, inputs_embeds)
            # what the loss is taken from where the head does not take it itself: once, for both
            logits_TV = None
            if labels_T is not None and group is None and not computes_loss(self.lm_head):
                logits_TV = self.lm_head(x_tD)
            if labels_T is None or not skip_logits:
                known = logits_TV is not None and everything
                logits = tokens.spread(logits_TV) if known else self.logits(x_tD, tokens, logits_to_keep, group)
            if labels_T is not None:
                loss = self.loss(x_tD, labels_T, num_items_in_batch, group, logits_TV)
        if cache is not None:
            cache.end(input_ids.shape[-1])
        output = Output(loss, logits, cache)
        return output.to_tuple() if return_dict is False else output

    def hidden_states(
        self,
        tokens: Tokens,
        pixels: Tensor | None = None,
        image_sizes: Tensor | Sequence | None = None,
        cache: KVCache | None = None,
        group: torch.distributed.ProcessGroup | None = None,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """(t, D): what the head takes."""
        if cache is not None:
            cache.begin(tokens.sequences.rows, tokens.sequences.lengths, tokens.ids_T.device)
        if embeds is None:
            x_tD = self.model.language_model.embed(tokens.ids_T, group)
        else:
            x_tD = tokens.rows(embeds)
        x_tD = self.place_images(x_tD, tokens.ids_T, pixels, image_sizes, group)
        text = self.model.language_model
        with nullcontext() if self.layout is None else self.layout.summed_together(text):
            return text(x_tD, tokens, cache, group)

    def place_images(
        self,
        x_tD: Tensor,
        ids_T: Tensor,
        pixels: Tensor | None,
        image_sizes: Tensor | Sequence | None,
        group: torch.distributed.ProcessGroup | None,
    ) -> Tensor:
        """Embeddings with the image tokens of this rank's slice replaced by features."""
        if pixels is None:
            return x_tD if self.layout is None else self.layout.without_images(self, x_tD)
        if self.config.vision is None:
            raise ValueError(
                "pixel_values for a model without a vision tower: its checkpoint is the language model alone"
            )
        grids = grids_of(pixels, image_sizes, self.config.vision)
        features_ND = self.model.image_features(pixels.to(x_tD.device), grids)
        return self.place_features(x_tD, ids_T, features_ND, group)

    def place_features(
        self, x_tD: Tensor, ids_T: Tensor, features_ND: Tensor, group: torch.distributed.ProcessGroup | None
    ) -> Tensor:
        """Embeddings with one feature for each image token of ``ids_T``, in their order."""
        features_ND = features_ND.to(x_tD.dtype)
        is_image_T = ids_T == self.config.image_token
        wanted = int(is_image_T.sum())
        if wanted != features_ND.shape[0]:
            raise ValueError(f"{wanted} image tokens in input_ids, but the images make {features_ND.shape[0]} features")
        rank = 0 if group is None else group.rank()
        mine = slice(rank * x_tD.shape[0], (rank + 1) * x_tD.shape[0])
        which_t = is_image_T.cumsum(0)[mine] - 1
        at = is_image_T[mine].nonzero()[:, 0]
        return x_tD.index_copy(0, at, features_ND[which_t[at]])

    def logits(
        self, x_tD: Tensor, tokens: Tokens, keep: int | Tensor, group: torch.distributed.ProcessGroup | None
    ) -> Tensor:
        """Logits in the input's shape; of a sharded vocabulary without a gradient."""
        x_TD = all_gather_tokens(x_tD, group)
        if isinstance(keep, int) and keep == 0:
            return tokens.spread(self.whole_vocabulary(self.lm_head(x_TD), group))
        columns = slice(-keep, None) if isinstance(keep, int) else keep
        kept = tokens.spread(x_TD)[..., columns, :]
        logits = self.whole_vocabulary(self.lm_head(kept.reshape(-1, kept.shape[-1])), group)
        return logits.view(*kept.shape[:-1], -1)

    def whole_vocabulary(self, logits_Tv: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
        if group is None:
            return logits_Tv
        logits_VT = all_gather_tokens(logits_Tv.detach().t().contiguous(), group)
        return logits_VT[: self.config.text.vocab_size].t()

    def labels_of(self, tokens: Tokens, labels: Tensor | None, shifted: Tensor | None) -> Tensor | None:
        """(T,): what each token is to predict."""
        if shifted is None:
            if labels is None:
                return None
            shifted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        if shifted.numel() != torch.Size(tokens.shape).numel():
            raise ValueError(f"labels are {list(shifted.shape)} for input_ids {list(tokens.shape)}")
        return tokens.pick(shifted.to(tokens.ids_T.device))

    def loss(
        self,
        x_tD: Tensor,
        labels_T: Tensor,
        num_items: int | Tensor | None,
        group: torch.distributed.ProcessGroup | None,
        logits_TV: Tensor | None = None,
    ) -> Tensor:
        """Summed cross-entropy over the number of supervised tokens, both over all ranks."""
        if num_items is None:
            num_items = (labels_T != IGNORED).sum()
            if self.layout is not None:
                num_items = all_reduce_sum(num_items, self.layout.batch_group)
        x_TD = all_gather_tokens(x_tD, group)
        if group is None:
            total = self.lm_head(x_TD, labels_T) if logits_TV is None else summed_loss(logits_TV, labels_T)
        else:
            options = {"vocab_size": self.config.text.vocab_size, "num_items": 1}
            total = vocab_parallel_linear_cross_entropy(x_TD, self.lm_head.rows(), labels_T, group, **options)
        if self.layout is not None:
            total = all_reduce_sum(total, self.layout.batch_group)
        return total / num_items
