"""Generation: ragged prompts into a cache, then one token a row and step, on the device, without waiting for it."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from m3kernels.models.generation.prefill import Plan, Prefill, planned
from m3kernels.models.generation.prompt import GenerationError, Prompt, Sampling
from m3kernels.models.generation.state import State
from m3kernels.models.generation.step import DecodeStep, evaluating, module_step, states_of, why_not_fused
from m3kernels.models.ministral3 import Ministral3
from m3kernels.ops.fp8_dequantize import FP8
from m3kernels.parallel import local

KV_DTYPES = {"fp8": FP8}
# tokens between two looks at what was drawn, where nobody waits for each
EVERY = 8
MAX_EVERY = 64
Reason = Literal["stop", "length", "interrupted"]


@dataclass
class Generation:
    """What came after one prompt.

    Attributes:
        tokens: ids, without the stop token.
        reason: "stop" (a stop token, or ``Run.stop``), "length" (``max_new_tokens``) or "interrupted".
    """

    tokens: list[int] = field(default_factory=list)
    reason: Reason = "interrupted"


class Generator:
    """Generates with a model's own parameters; keeps the last call's cache, whose prefixes the next call reuses.

    Attributes:
        fused: whether the decode step runs as fused kernels; ``why_not`` says why it does not.
        graphs: whether it is replayed as a CUDA graph.
    """

    def __init__(
        self,
        model: Ministral3,
        *,
        kv_dtype: Literal["fp8"] | None = None,
        chunk: int = 8192,
        graphs: bool = True,
    ):
        """
        Args:
            model: whole, or tensor-parallel with its weights on every data-parallel rank; ``m3kernels.patch`` makes its
                prefill fast.
            kv_dtype: "fp8" keeps keys and values in E4M3 with a scale for each token and head; None: as computed.
            chunk: tokens that go through the model at once while prompts are read.
            graphs: whether the decode step is replayed as a CUDA graph where it can be: fused, on CUDA, and with NCCL
                between ranks.

        Raises:
            GenerationError: an option that there is not, or a model whose weights are spread over data-parallel ranks.
        """
        if kv_dtype is not None and kv_dtype not in KV_DTYPES:
            raise GenerationError(f"kv_dtype={kv_dtype!r}; allowed: None (as computed) or 'fp8'")
        if chunk < 1:
            raise GenerationError(f"chunk={chunk}; allowed: 1 token and more")
        layout = model.layout
        if layout is not None and layout.batch_group is not None:
            raise GenerationError(
                f"the model's weights are spread over {layout.batch_group.size()} data-parallel ranks; generate with dp=1, "
                "in as many processes as tp has ranks"
            )
        self.model, self.chunk = model, chunk
        # held while the cache is written; a caller that wants its rows whole holds it to their end
        self.lock = threading.RLock()
        self.kv_dtype = KV_DTYPES.get(kv_dtype)
        self.group = None if layout is None else layout.tp_group
        self._graphs = graphs
        self._state: State | None = None
        self._look_at_model()

    def _look_at_model(self) -> None:
        """Makes the decode step out of the model's parameters as they are."""
        model = self.model
        self.why_not = why_not_fused(model)
        self.fused = not self.why_not
        on_nccl = self.group is None or dist.get_backend(self.group) == "nccl"
        self.graphs = self._graphs and self.fused and model.device.type == "cuda" and on_nccl
        with torch.no_grad():
            self.step: Callable = DecodeStep(model) if self.fused else module_step(model)
        self._state = None
        # their dicts, not the modules: where the caller has given a weak proxy, the model itself must not be held
        self._states = states_of(model)
        self._held = [tensors for module in model.modules() for tensors in (module._parameters, module._buffers)]
        self._modules = [(parent._modules, *item) for parent in model.modules() for item in parent._modules.items()]
        self._memory, self._versions = self._seen()

    def _seen(self) -> tuple[list, list[int]]:
        """(where every parameter and buffer lies, how often each was written to)."""
        tensors = [local(t) for held in self._held for t in held.values() if t is not None]
        # what was made in inference mode does not count its writes
        versions = [0 if t.is_inference() else t._version for t in tensors]
        return [(t.data_ptr(), t.dtype) for t in tensors], versions

    def _notice_changes(self) -> None:
        """Other modules, hooks or parameters make another step; other values make what the cache holds another model's."""
        memory, versions = self._seen()
        same = all(children.get(name) is module for children, name, module in self._modules)
        if not same or memory != self._memory or why_not_fused(self.model) != self.why_not:
            self._look_at_model()
        elif versions != self._versions:
            self.forget()
            self._versions = versions

    def forget(self) -> None:
        """The next call computes its prompts from their beginnings: for weights that were written behind torch's back."""
        if self._state is not None:
            self._state.forget()

    # tensors made in inference mode could not be written to outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def start(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling(), *, every: int = 1) -> "Run":
        """Reads the prompts and begins to decode.

        Args:
            prompts: of any lengths, with any images: none is padded.
            sampling: how tokens are drawn, and when to stop.
            every: tokens a row in a burst; the host looks at what was drawn once for each.

        Raises:
            GenerationError: a prompt that the model does not take; ``prompt N`` in the message counts from 0.
        """
        if not prompts:
            raise GenerationError("there is no prompt; give at least one")
        if not 1 <= every <= MAX_EVERY:
            raise GenerationError(f"every={every}; allowed: 1 to {MAX_EVERY} tokens")
        config = self.model.config
        plans = [planned(prompt, config, sampling, f"prompt {row}") for row, prompt in enumerate(prompts)]
        for token in sampling.stop_tokens:
            if not 0 <= token < self.model.config.text.vocab_size:
                raise GenerationError(f"stop token {token}; the model has {self.model.config.text.vocab_size} ids")
        # from several threads, one call after the other
        with self.lock:
            self._notice_changes()
            longest = max(len(plan.keys) for plan in plans) + sampling.max_new_tokens
            state, ticket = self._state_for(plans, longest)
            with evaluating(self._states):
                logits_BV = Prefill(self.model, self.chunk)(plans, state.cache)
            state.begin([len(plan.keys) for plan in plans], sampling)
            state.draw(logits_BV)
            return Run(self, state, ticket, sampling, every)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> list[Generation]:
        """All tokens of all prompts; raises as :meth:`start`."""
        run = self.start(prompts, sampling, every=EVERY)
        for _ in run:
            pass
        return run.results

    def _state_for(self, plans: Sequence[Plan], longest: int) -> tuple[State, int]:
        """A state with room, whose rows hold what the last call left of their prompts' beginnings; a run's ticket."""
        old, device = self._state, self.model.device
        fits = old is not None and old.rows == len(plans) and old.cache.room >= longest
        state = old if fits else State(len(plans), _room(longest), self.kv_dtype, self.step, self.group, device)
        ticket = state.take_over(old, [plan.keys for plan in plans])
        self._state = state
        return state, ticket


def _room(tokens: int) -> int:
    """Slots for so many tokens: a few more, so that the next call's prompts fit as well."""
    step = max(256, 1 << max(tokens.bit_length() - 4, 0))
    return -(-tokens // step) * step


class Run:
    """Bursts of new tokens, one list a row; a row that has ended gives empty ones."""

    def __init__(self, generator: Generator, state: State, ticket: int, sampling: Sampling, every: int):
        self._generator, self._state, self._sampling, self._every = generator, state, sampling, every
        self.results = [Generation() for _ in range(state.rows)]
        self._open = set(range(state.rows))
        self._ticket = ticket
        # fetched at once: another call may begin before this run is iterated over
        self._first = state.fetch(1)
        # the next burst is under way while the host looks at one
        self._ahead = 2 if state.device.type == "cuda" else 1
        self._iterator = self._bursts()

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self

    def __next__(self) -> list[list[int]]:
        return next(self._iterator)

    def stop(self, row: int) -> None:
        """Ends a row: what it has stays, nothing comes after."""
        if row in self._open:
            self._open.discard(row)
            self.results[row].reason = "stop"

    def _bursts(self) -> Iterator[list[list[int]]]:
        waiting = deque([self._first])
        launched, most = 1, self._sampling.max_new_tokens
        while self._open:
            while launched < most and len(waiting) < self._ahead:
                count = min(self._every, most - launched)
                waiting.append(self._launch(count))
                launched += count
            if not waiting:
                break
            yield self._take(waiting.popleft())
        for row in self._open:
            self.results[row].reason = "length"
        self._open.clear()

    def _launch(self, count: int) -> Callable[[], Tensor]:
        """So many steps; a call that waits for their tokens."""
        with self._generator.lock:
            self._state.check(self._ticket)
            self._state.run(count, graph=self._generator.graphs)
            return self._state.fetch(count)

    def _take(self, fetched: Callable[[], Tensor]) -> list[list[int]]:
        """The burst's tokens by row, up to their stop token."""
        burst: list[list[int]] = [[] for _ in self.results]
        stops = self._sampling.stop_tokens
        for tokens in fetched().tolist():
            for row in list(self._open):
                if tokens[row] in stops:
                    self.stop(row)
                else:
                    burst[row].append(tokens[row])
        for row, tokens in enumerate(burst):
            self.results[row].tokens += tokens
            self._state.note(self._ticket, row, tokens)
        return burst
