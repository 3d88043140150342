"""What changes while tokens are drawn: all of it on the device, where a CUDA graph of the decode step finds it again."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from m3kernels.models.generation.prefill import common
from m3kernels.models.generation.prompt import GenerationError, Sampling
from m3kernels.models.ministral3.cache import KVCache
from m3kernels.ops import sample

# a step runs so often before it is recorded: kernels are compiled and libraries start on the way
WARMUPS = 2


class State:
    """Cache, last tokens, positions and draws of B rows.

    Attributes:
        keys: of each row, what its part of the cache was or is to be computed from (``Prompt.keys``), with the tokens in
            ``later`` behind them: at all times, after an error or an interrupt too, the first ``cache.lengths`` of both are what
            the cache holds.
    """

    def __init__(
        self,
        rows: int,
        room: int,
        kv_dtype: torch.dtype | None,
        step: Callable,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ):
        self.rows, self.device, self.group, self.step = rows, device, group, step
        self.cache = KVCache(rows, room, dtype=kv_dtype)
        self.forget()
        self.ids = torch.zeros(rows, dtype=torch.long, device=device)
        # what goes on by one with every step, in one launch: where each row's token goes, how many it has then, and how many
        # tokens were drawn, which is the next draw's number and where it is kept
        self.clock = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.positions, self.filled, self.count = self.clock[0], self.clock[1], self.clock[2, :1]
        self.drawn = torch.zeros(room, rows, dtype=torch.long, device=device)
        self.temperature, self.top_p = (torch.ones(1, device=device) for _ in range(2))
        self.top_k, self.seed = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.greedy, self.filters = True, False
        self._graph: tuple[tuple, torch.cuda.CUDAGraph] | None = None
        self._counted, self._ticket = 0, 0

    def take_over(self, other: "State | None", keys: list[np.ndarray]) -> int:
        """Rows for new prompts, each with what ``other``, which may be this state, holds of its beginning.

        Returns:
            A ticket for the run over them; the one before it is no longer valid.
        """
        held = [] if other is None else [other.held(row) for row in range(other.rows)]
        lengths, moves = [0] * self.rows, []
        for row, mine in enumerate(keys):
            # the last token is computed in any case: it has the logits
            shared = [min(common(mine, theirs), len(mine) - 1) for theirs in held]
            best = max(shared, default=0)
            if self is other and shared[row] == best:
                lengths[row] = best
            else:
                moves.append((row, shared.index(best) if best else 0, best))
        self._ticket += 1
        # what stays belongs to the old keys and to the new ones; what moves counts once it is there
        self.cache.lengths = lengths
        self.keys, self.later = keys, [[] for _ in keys]
        if other is not None and moves:
            self.cache.take(other.cache, *(list(column) for column in zip(*moves)))
        return self._ticket

    def begin(self, lengths: list[int], sampling: Sampling) -> None:
        """After the prompts, of these lengths, were read."""
        self.clock.copy_(torch.tensor([[n - 1 for n in lengths], lengths, [0] * len(lengths)]))
        self._counted = 0
        self.greedy = sampling.temperature == 0
        self.filters = sampling.top_k > 0 or sampling.top_p < 1
        for tensor, value in (
            (self.temperature, sampling.temperature),
            (self.top_p, sampling.top_p),
            (self.top_k, sampling.top_k),
            (self.seed, sampling.seed),
        ):
            tensor.fill_(value)

    def draw(self, logits_BV: Tensor) -> None:
        """The rows' next tokens, their positions, and one more drawn; nothing of it is seen by the host."""
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        ids = sample(logits_BV, **options, step=self.count, greedy=self.greedy, filters=self.filters)
        if self.group is not None:
            # ranks have the same logits up to a rounding, and must go on together
            dist.broadcast(ids, group=self.group, group_src=0)
        self.ids.copy_(ids)
        self.drawn.index_copy_(0, self.count, ids[None])
        self.clock += 1

    # tensors made in inference mode could not be written to outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, steps: int, *, graph: bool) -> None:
        """So many steps: a token of every row each."""
        if graph and not self._recorded():
            self._record()
        for _ in range(steps):
            if graph:
                self._graph[1].replay()
            else:
                self.forward()
            self.cache.lengths = [length + 1 for length in self.cache.lengths]
        self._counted += steps

    def _recorded(self) -> bool:
        return self._graph is not None and self._graph[0] == (self.greedy, self.filters)

    def _record(self) -> None:
        """Records one step; what runs before to be recorded leaves nothing behind but a slot that is written again."""
        changing = (self.ids, self.clock, self.drawn)
        before = [tensor.clone() for tensor in changing]
        self._graph = None

        def restore() -> None:
            for tensor, value in zip(changing, before):
                tensor.copy_(value)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                self.forward()
                restore()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.forward()
        restore()
        self._graph = (self.greedy, self.filters), graph

    def forward(self) -> None:
        self.draw(self.step(self.ids, self.positions, self.filled, self.cache))

    def fetch(self, count: int) -> Callable[[], Tensor]:
        """A call that waits for the last ``count`` draws, (count, B), and no longer."""
        drawn = self.drawn[self._counted - count + 1 : self._counted + 1]
        if self.device.type != "cuda":
            # the next call's draws go to the same place
            drawn = drawn.clone()
            return lambda: drawn
        host = torch.empty(drawn.shape, dtype=torch.long, pin_memory=True)
        host.copy_(drawn, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait

    def held(self, row: int) -> np.ndarray:
        """The keys that the cache's row was computed from."""
        later = np.array(self.later[row], dtype=np.int64)
        return np.concatenate([self.keys[row], later])[: self.cache.lengths[row]]

    def forget(self) -> None:
        """The cache's rows begin like no prompt."""
        self.keys: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * self.rows
        self.later: list[list[int]] = [[] for _ in range(self.rows)]

    def check(self, ticket: int) -> None:
        """Raises GenerationError for a run whose rows another one has taken."""
        if ticket != self._ticket:
            raise GenerationError(
                "another call has begun with this model's cache: take a run to its end before the next, or make a Generator "
                "for each"
            )

    def note(self, ticket: int, row: int, tokens: list[int]) -> None:
        """Tokens that followed in a row, for the next call to find."""
        # without keys, what they would follow was forgotten
        if ticket == self._ticket and len(self.keys[row]):
            self.later[row] += tokens
