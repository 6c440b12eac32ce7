"""Where in the trajectory the network is: written by the loop, read by the network's parts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Evaluations:
    """Network evaluations, counted per image: one for every row that went through the network."""

    full: int = 0
    cached: int = 0


class Clock:
    """The position of the current network evaluation.

    Quantizers, caches and corrections hold a reference and read it; only :class:`Denoiser`
    writes it. No part counts its own calls, so extra evaluations (IEC) cannot shift anything.

    Attributes:
        total: number of sampler steps.
        full_steps: the steps whose evaluations run the whole network; step 0 always does.
        step: index of the current step in sampling order, 0 is the noisiest.
        evaluation: 0 for the step's own prediction, k for its k-th extra evaluation.
        full: whether this evaluation runs the whole network.
        store: whether a full evaluation may replace what a cache holds.
        rows: positions in the network's batch that this evaluation covers, None for all of them.
        batch: rows of the network's whole batch (twice the images under guidance).
        steps: ``[batch]``, the step of each row, where one evaluation covers several steps (only
            calibration does so); None: all rows are at ``step``.
        evaluations: the count so far.
    """

    def __init__(self, total: int, full_steps: Collection[int] | None = None) -> None:
        self.total = total
        self.full_steps = frozenset(range(total) if full_steps is None else full_steps)
        self.step = 0
        self.evaluation = 0
        self.full = True
        self.store = True
        self.rows: Tensor | None = None
        self.batch = 0
        self.steps: Tensor | None = None
        self.evaluations = Evaluations()

    def reset(self) -> None:
        """Forget the evaluations counted so far."""
        self.evaluations = Evaluations()

    def is_full(self, step: int) -> bool:
        """Whether the evaluations of ``step`` run the whole network."""
        return step in self.full_steps

    def at(self, table: Tensor, like: Tensor) -> Tensor:
        """The entries of ``table [total, ...]`` that hold now, shaped to act on ``like [b, ...]``.

        ``[1, ..., 1, 1]``; or ``[b, ..., 1, 1]`` where the rows are at different steps. ``b`` may
        be a multiple of the rows (attention heads, say), those of a row standing together.
        """
        if self.steps is None:
            entries = table[self.step].unsqueeze(0)
        else:
            entries = table[self.steps].repeat_interleave(len(like) // len(self.steps), dim=0)
        return entries.reshape(*entries.shape, *[1] * (like.dim() - entries.dim()))
