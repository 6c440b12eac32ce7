"""What reconstruction learns from: network inputs drawn along trajectories, and a block's share.

An item is one row of a network batch: a sample at some step with its condition. For a step that
is cached it comes with the feature that the cache would hold, as the full-precision network
computes it at the latest full step of the same trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from iec_eval.clock import Clock
from iec_eval.efficiency.deepcache import CachedUNet, find_cache

if TYPE_CHECKING:
    from iec_eval.calibration import Bench


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared differences, summed over channels (dimension 1) and averaged over the rest."""
    return (output - target).square().sum(dim=1).mean()


@dataclass(frozen=True)
class Arguments:
    """Arguments of many calls of a module, row by row; what is no tensor is the same in all."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    def rows(self, which: Tensor | slice, device: torch.device) -> Arguments:
        """The arguments of some rows."""
        return self.changed(lambda value: value[which].to(device))

    def mixed(self, other: Arguments, mine: Tensor) -> Arguments:
        """These arguments in the rows where ``mine`` is true, the other ones elsewhere.

        Those that have the same name in both belong together, the rest by their order: what one
        call gives by name, another may give by its place.
        """
        others = {name: value for name, value in other.named.items() if name not in self.named}
        rest = iter([v for v in (*other.positional, *others.values()) if isinstance(v, Tensor)])

        def alternative(name: str) -> Tensor:
            found: Tensor = other.named[name] if name in other.named else next(rest)
            return found

        def chosen(value: Tensor, instead: Tensor) -> Tensor:
            return torch.where(mine.view(-1, *[1] * (value.dim() - 1)), value, instead)

        placed = [chosen(v, next(rest)) if isinstance(v, Tensor) else v for v in self.positional]
        named = {
            name: chosen(value, alternative(name)) if isinstance(value, Tensor) else value
            for name, value in self.named.items()
        }
        return Arguments(tuple(placed), named)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        """The same, with each tensor replaced by what ``change`` makes of it."""

        def apply(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        named = {name: apply(value) for name, value in self.named.items()}
        return Arguments(tuple(map(apply, self.positional)), named)

    @classmethod
    def joined(cls, parts: Sequence[Arguments]) -> Arguments:
        """The rows of all parts, one after the other."""

        def join(values: Sequence[Any]) -> Any:
            return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]

        columns = zip(*(part.positional for part in parts), strict=True)
        named = {name: join([part.named[name] for part in parts]) for name in parts[0].named}
        return cls(tuple(join(column) for column in columns), named)


@dataclass(frozen=True)
class Batch:
    """Some rows of a block's data."""

    arguments: Arguments
    target: Tensor
    steps: Tensor

    def run(self, block: nn.Module) -> Tensor:
        """The block's output for these rows."""
        return first_tensor(block(*self.arguments.positional, **self.arguments.named))


@dataclass(frozen=True)
class BlockData:
    """Inputs and wanted outputs of one block.

    ``alternative`` are the inputs without the errors of earlier blocks, which a row is given with
    probability ``1 - share``.
    """

    arguments: Arguments
    alternative: Arguments | None
    target: Tensor
    steps: Tensor
    share: float

    def __len__(self) -> int:
        return len(self.steps)

    def batch(self, rows: Tensor, device: torch.device, generator: torch.Generator) -> Batch:
        """The given rows, for learning."""
        chosen = self.arguments.rows(rows, device)
        if self.alternative is not None:
            mine = torch.rand(len(rows), generator=generator) < self.share
            chosen = chosen.mixed(self.alternative.rows(rows, device), mine.to(device))
        return Batch(chosen, self.target[rows].to(device), self.steps[rows].to(device))

    @torch.no_grad()
    def loss(self, bench: Bench, block: nn.Module) -> float:
        """Mean squared error of the block over all rows."""
        total = 0.0
        for rows in torch.arange(len(self)).split(bench.batch_size):
            steps = self.steps[rows].to(bench.device)
            batch = Batch(
                self.arguments.rows(rows, bench.device), self.target[rows].to(bench.device), steps
            )
            bench.clock.steps = steps
            total += float(squared_error(batch.run(block), batch.target)) * len(rows)
        bench.clock.steps = None
        return total / len(self)


@dataclass(frozen=True)
class Items:
    """Network inputs ``[n, ...]`` with their steps, those of full steps first.

    ``features`` belong to the items from ``first_cached`` on.
    """

    arguments: Arguments
    steps: Tensor
    first_cached: int
    features: Tensor | None

    def of_block(
        self,
        bench: Bench,
        teacher: nn.Module,
        student_block: nn.Module,
        teacher_block: nn.Module,
        share: float,
    ) -> BlockData:
        """Inputs of the block in the network as it is, outputs of the full-precision one."""
        with torch.no_grad():
            inputs, rows = self._student_inputs(bench, student_block)
            outputs, alternatives = self._teacher(bench, teacher, teacher_block, rows)
        other = Arguments.joined(alternatives) if share < 1 else None
        steps = self.steps[torch.cat(rows)]
        return BlockData(Arguments.joined(inputs), other, torch.cat(outputs), steps, share)

    @torch.no_grad()
    def order_of_calls(self, teacher: nn.Module, blocks: Mapping[str, nn.Module]) -> list[str]:
        """Names of the blocks in the order the network first calls them."""
        device = next(teacher.parameters()).device
        with _called(blocks) as names:
            self._run(teacher, slice(0, 1), device)
        return names

    @torch.no_grad()
    def called_when_cached(self, bench: Bench, blocks: Mapping[str, nn.Module]) -> set[str]:
        """Names of the blocks that a cached evaluation runs."""
        if self.first_cached == len(self.steps):
            return set()
        with _called(blocks) as names:
            self._run_student(bench, torch.tensor([self.first_cached]))
        return set(names)

    def _student_inputs(
        self, bench: Bench, block: nn.Module
    ) -> tuple[list[Arguments], list[Tensor]]:
        """What the block is given, and for which items: it may not run at cached steps."""
        found, rows = [], []
        for part in self._parts(bench.batch_size):
            with _watch(block) as seen:
                self._run_student(bench, part)
            if seen:
                found.append(seen[0][0])
                rows.append(part)
        return found, rows

    def _teacher(
        self, bench: Bench, teacher: nn.Module, block: nn.Module, rows: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Arguments]]:
        outputs, inputs = [], []
        for part in rows:
            with _watch(block, output=True) as seen:
                self._run(teacher, part, bench.device)
            inputs.append(seen[0][0])
            outputs.append(seen[0][1])
        return outputs, inputs

    def _parts(self, together: int) -> list[Tensor]:
        """Items evaluated together: all of full steps or all of cached ones."""
        order = torch.arange(len(self.steps))
        full, cached = order[: self.first_cached], order[self.first_cached :]
        return [p for group in (full, cached) for p in group.split(together) if len(p)]

    def _run_student(self, bench: Bench, part: Tensor) -> None:
        clock = bench.clock
        clock.steps, clock.rows = self.steps[part].to(bench.device), None
        clock.evaluation, clock.store, clock.full = 0, True, bool(part[0] < self.first_cached)
        if not clock.full:
            assert self.features is not None
            cache = cast(CachedUNet, find_cache(bench.network))
            cache.feature = self.features[part - self.first_cached].to(bench.device)
        self._run(bench.network, part, bench.device)
        clock.steps, clock.full = None, True

    def _run(self, network: nn.Module, part: Tensor | slice, device: torch.device) -> None:
        chosen = self.arguments.rows(part, device)
        with suppress(_Reached):
            network(*chosen.positional, **chosen.named)


def gather_items(bench: Bench, teacher: nn.Module, cut: int | None, count: int) -> Items:
    """Draw ``count`` items over all steps and calibration images of full-precision trajectories.

    Args:
        bench: of the quantized network; its clock says which steps are full.
        teacher: the full-precision network, not cached.
        cut: of the cache; None without one, or with one of another kind, whose cached steps
            are then left out.
        count: number of items; all there are, if fewer.
    """
    clock = Clock(bench.clock.total)
    steps = bench.clock.full_steps if cut is None else range(clock.total)
    recorder = _Recorder(bench, clock, count, steps)
    network = teacher if cut is None else CachedUNet(teacher, cut, clock)
    handles = [
        network.register_forward_pre_hook(recorder.before, with_kwargs=True),
        network.register_forward_hook(recorder.after),
    ]
    try:
        replace(bench, network=network, clock=clock).run([])
    finally:
        for handle in handles:
            handle.remove()
    return recorder.items()


class _Recorder:
    """Keeps randomly drawn rows of the batches that a network is given at ``steps``."""

    def __init__(self, bench: Bench, clock: Clock, count: int, steps: Collection[int]) -> None:
        self._clock, self._full_steps = clock, bench.clock.full_steps
        self._random = torch.Generator().manual_seed(bench.seed)
        self._steps = frozenset(steps)
        rows_of_an_image = 2 if bench.model.condition(range(1)).guided else 1
        self._rows_due, self._rows_left = count, len(steps) * bench.images * rows_of_an_image
        self._arguments: Arguments | None = None
        self._start: Tensor | None = None
        self._kept: list[tuple[Arguments, int, Tensor | None]] = []

    def before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = Arguments(args, kwargs)

    def after(self, network: nn.Module, args: Any, output: Any) -> None:
        assert self._arguments is not None
        step = self._clock.step
        if self._clock.evaluation > 0:  # a sampler's further evaluations of a step
            return
        if isinstance(network, CachedUNet) and step in self._full_steps:
            self._start = cast(Tensor, network.feature)
        if step not in self._steps:
            return
        rows = self._draw(len(self._arguments.positional[0]))
        if not len(rows):
            return
        cached = step not in self._full_steps
        feature = self._start[rows].cpu() if cached and self._start is not None else None
        self._kept.append((self._arguments.rows(rows, torch.device("cpu")), step, feature))

    def items(self) -> Items:
        """What was kept, as ordinary tensors, full steps first."""
        kept = sorted(self._kept, key=lambda one: one[1] not in self._full_steps)
        joined = Arguments.joined([one[0] for one in kept])
        sizes = [len(one[0].positional[0]) for one in kept]
        steps = torch.cat([torch.full((n,), one[1]) for n, one in zip(sizes, kept, strict=True)])
        features = [one[2] for one in kept if one[2] is not None]
        full = sum(n for n, one in zip(sizes, kept, strict=True) if one[1] in self._full_steps)
        recalled = torch.cat(features).clone() if features else None
        return Items(joined.changed(torch.clone), steps, full, recalled)

    def _draw(self, batch: int) -> Tensor:
        """Rows of this batch to keep, so that in the end all rows were as likely."""
        expected = self._rows_due * batch / self._rows_left
        self._rows_left -= batch
        extra = float(torch.rand(1, generator=self._random)) < expected % 1
        wanted = min(batch, int(expected) + extra)
        self._rows_due -= wanted
        return torch.randperm(batch, generator=self._random)[:wanted]


class _Reached(Exception):
    """Raised from a hook once the block is reached: the rest of the network is not needed."""


@contextmanager
def _watch(block: nn.Module, *, output: bool = False) -> Iterator[list[tuple[Arguments, Any]]]:
    """Collect what ``block`` is given, and gives if ``output``; then stop the network."""
    seen: list[tuple[Arguments, Any]] = []
    cpu = torch.device("cpu")

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((Arguments(args, kwargs).rows(slice(None), cpu), None))
        if not output:
            raise _Reached

    def after(module: nn.Module, args: Any, result: Any) -> None:
        seen[0] = (seen[0][0], first_tensor(result).cpu())
        raise _Reached

    handles = [block.register_forward_pre_hook(before, with_kwargs=True)]
    if output:
        handles.append(block.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _called(blocks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Names of the blocks that are called meanwhile, in order, each once."""
    names: list[str] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if name not in names:
                names.append(name)

        return hook

    handles = [block.register_forward_pre_hook(note(name)) for name, block in blocks.items()]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first of several."""
    return output if isinstance(output, Tensor) else cast(Tensor, output[0])
