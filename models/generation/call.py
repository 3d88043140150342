"""A call of ``generate`` as transformers has it: inputs and options in, padded rows, a streamer's steps or bursts out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from m3kernels.models.generation.batches import check_ids, padded, prompts_of
from m3kernels.models.generation.engine import EVERY, Generator, Run
from m3kernels.models.generation.options import Choice, choice_of, ids_of, merged
from m3kernels.models.generation.prompt import GenerationError, Prompt
from m3kernels.models.ministral3 import Ministral3

Inputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | Sequence | None]


@dataclass(frozen=True)
class Call:
    """What is to be generated.

    Attributes:
        input_ids: (batch, seq), as given.
        prompts: its rows, without padding, with their images.
        choice: how.
    """

    input_ids: Tensor
    prompts: list[Prompt]
    choice: Choice

    @classmethod
    def of(
        cls,
        model: Ministral3,
        inputs: Inputs,
        given: Mapping[str, Any],
        configs: Sequence[GenerationConfig | None],
        seed: int | None,
    ) -> "Call":
        """Checks everything before anything is computed.

        Args:
            inputs: input_ids, attention_mask, pixel_values and image_sizes.
            given: options of the call: those that are there.
            configs: what the others are taken from, the first one first.

        Raises:
            GenerationError, TypeError: see :func:`m3kernels.generate`.
        """
        values = merged(given, *configs)
        input_ids, attention_mask, pixel_values, image_sizes = inputs
        if input_ids is None:
            (begin,) = ids_of(values.get("bos_token_id"))[:1] or (None,)
            if begin is None:
                raise GenerationError("there are no input_ids, and no bos_token_id to begin with: give input_ids")
            input_ids = torch.tensor([[begin]], device=model.device)
        check_ids(input_ids)
        sets_length = any(source.get("max_length") is not None for source in (given, *_dicts(configs)))
        choice = choice_of(
            values,
            input_ids.shape[-1],
            sets_length=sets_length,
            max_positions=model.config.text.max_positions,
            seed=seed,
        )
        options = {"pad": choice.pad, "stops": choice.sampling.stop_tokens}
        prompts = prompts_of(input_ids, attention_mask, pixel_values, image_sizes, model.config, **options)
        return cls(input_ids, prompts, choice)

    def rows(self, generator: Generator, streamer: BaseStreamer | None = None) -> Tensor | GenerateDecoderOnlyOutput:
        """(batch, seq + new) ids, in transformers' output class where that was asked for."""
        # another thread's call would take the cache: it waits
        with generator.lock:
            rows = self._rows(generator, streamer)
        sequences = padded(self.input_ids, rows, self.choice.pad)
        return GenerateDecoderOnlyOutput(sequences=sequences) if self.choice.returns_dict else sequences

    def _rows(self, generator: Generator, streamer: BaseStreamer | None) -> list[list[int]]:
        """The new tokens of each row, with the one that ended it."""
        if streamer is not None:
            streamer.put(self.input_ids.cpu())
        # which of the end-of-sequence ids was drawn stands in the output: the engine leaves it out
        sampling = replace(self.choice.sampling, stop_tokens=())
        run = generator.start(self.prompts, sampling, every=EVERY if streamer is None else 1)
        rows: list[list[int]] = [[] for _ in self.prompts]
        going = set(range(len(rows)))
        for burst in run:
            step = [self.choice.pad] * len(rows)
            for row in list(going):
                for token in burst[row]:
                    rows[row].append(token)
                    step[row] = token
                    if token in self.choice.sampling.stop_tokens:
                        going.discard(row)
                        run.stop(row)
                        break
            if streamer is not None:
                streamer.put(torch.tensor(step))
        if streamer is not None:
            streamer.end()
        return rows

    def bursts(self, generator: Generator, every: int = 1) -> Run:
        """The engine's iterator of new tokens, without those that end a sequence."""
        ids = range(generator.model.config.text.vocab_size)
        # transformers takes others as well: they never come
        stops = tuple(token for token in self.choice.sampling.stop_tokens if token in ids)
        return generator.start(self.prompts, replace(self.choice.sampling, stop_tokens=stops), every=every)


def _dicts(configs: Sequence[GenerationConfig | None]) -> list[dict]:
    return [config.to_dict() for config in configs if config is not None]
