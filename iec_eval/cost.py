"""What an evaluation of the network costs, counted on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iec_eval.assembly import Assembly, assemble_skeleton, scheduling
from iec_eval.clock import Clock, Evaluations
from iec_eval.denoising import Condition, Denoiser, denoise
from iec_eval.efficiency.base import EfficiencyMethod
from iec_eval.errors import IecEvalError, one_line
from iec_eval.fingerprints import digest
from iec_eval.models.base import DiffusionModel
from iec_eval.noise import Noise
from iec_eval.planning import Plan, distinct_networks, network_key
from iec_eval.samplers.base import Sampler
from iec_eval.study import Part

FULL_BITS = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates, and their bit operations: each counts the product of its bits."""

    macs: int = 0
    bit_operations: int = 0


@dataclass(frozen=True)
class EvaluationCost:
    """Work of one evaluation for one image, and the bytes of all weights.

    Convolutions, linear layers and attention products count, as torch's flop counter sees them;
    a guided evaluation is counted with both its halves. Weights count at the bits a module
    declares for them, with the scales they need.
    """

    full: Work
    cached: Work
    weight_bytes: int

    def macs(self, evaluations_full: float, evaluations_cached: float) -> float:
        """Multiply-accumulates of that many evaluations."""
        return self.full.macs * evaluations_full + self.cached.macs * evaluations_cached

    def bit_operations(self, evaluations_full: float, evaluations_cached: float) -> float:
        """Bit operations of that many evaluations; 1024 a MAC where nothing is quantized."""
        full, cached = self.full.bit_operations, self.cached.bit_operations
        return full * evaluations_full + cached * evaluations_cached


@dataclass(frozen=True)
class Uncounted:
    """In place of a cost that could not be counted: some part needs more than shapes to run.

    Attributes:
        reason: what that part said, in one line.
    """

    reason: str
    weight_bytes: None = None

    def macs(self, evaluations_full: float, evaluations_cached: float) -> None:
        """Not known."""

    def bit_operations(self, evaluations_full: float, evaluations_cached: float) -> None:
        """Not known."""


_COUNTED: WeakKeyDictionary[DiffusionModel, dict[str, tuple[Work, Work]]] = WeakKeyDictionary()


def evaluation_costs(plans: Sequence[Plan]) -> list[EvaluationCost | Uncounted]:
    """The cost of an evaluation in each row, found once for rows with the same network."""
    distinct = distinct_networks(plans)
    found = {key: if_counted(evaluation_cost, plan) for key, plan in distinct.items()}
    return [found[network_key(plan)] for plan in plans]


def if_counted(count: Callable[[Plan], T], plan: Plan) -> T | Uncounted:
    """``count(plan)``, or why a part of it cannot be counted, which can still be run."""
    try:
        return count(plan)
    except IecEvalError:  # a row that cannot be at all
        raise
    except Exception as error:
        return Uncounted(one_line(error))


def evaluation_cost(plan: Plan) -> EvaluationCost:
    """Count a full and, if the plan has any, a cached evaluation; no weights are read."""
    assembly = assemble_skeleton(plan)
    return EvaluationCost(*_evaluation_work(assembly), stored_bytes(assembly.network))


def _evaluation_work(assembly: Assembly) -> tuple[Work, Work]:
    """Of a full and a cached evaluation: counted once for a model's network and the methods on it.

    What one evaluation does depends on neither the sampler, nor the number of its steps, nor how
    many of them are full; what the network stores may.
    """
    plan, clock = assembly.plan, assembly.clock
    some_cached = len(clock.full_steps) < clock.total
    known = _COUNTED.setdefault(plan.model, {})
    key = digest([_structure(plan), some_cached])
    if key not in known:
        full = _count(assembly, full=True)  # first: it stores what a cached one recalls
        known[key] = (full, _count(assembly, full=False) if some_cached else Work())
    return known[key]


def _structure(plan: Plan) -> list[Part]:
    """The methods, without what only says how many steps are full."""
    return [
        {key: value for key, value in part.items() if key != "interval" or interval(method) is None}
        for part, method in zip(plan.experiment.efficiency, plan.methods, strict=True)
    ]


def interval(method: EfficiencyMethod) -> int | None:
    """Every how many steps a method that caches has a full one; None if it has no such option."""
    caches = any(stage.slot == "cacher" for stage in method.parts())
    found = getattr(method.options, "interval", None)
    return found if caches and type(found) is int else None


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a network's tensors, at the bits its modules declare."""
    declared: int | None = getattr(module, "stored_bytes", None)
    if declared is not None:
        return declared
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    inner = sum(stored_bytes(child) for child in module.children())
    return inner + sum(tensor.numel() * tensor.element_size() for tensor in own)


def expected_evaluations(plan: Plan, full_steps: frozenset[int] | None = None) -> Evaluations:
    """Evaluations of one image: full and cached ones, found by a run with a stand-in network.

    ``full_steps`` are those of the calibrated row, where they are known; else as planned. A
    tolerance may stop corrections earlier than here, so it is an upper bound for K > 1.
    """
    total = len(plan.sampler.timesteps)
    clock = Clock(total, plan.planned_full_steps() if full_steps is None else full_steps)
    if not plan.callbacks and type(plan.sampler).evaluate is Sampler.evaluate:
        full = len(clock.full_steps)  # one evaluation a step: nothing to find out
        return Evaluations(full, total - full)
    denoiser = Denoiser(_StandIn(), Condition(), clock)
    denoise(plan.sampler, denoiser, Noise(0, [0], plan.model.shape), plan.callbacks)
    return clock.evaluations


def known_before_calibration(plan: Plan) -> bool:
    """Whether a row's evaluations are the same with any schedule that calibration may choose.

    They are not if a callback evaluates again at steps that it names itself, and whether these are
    full is yet to be found out. Tried with schedules that have every step full once, and some at
    random.
    """
    if not plan.callbacks or not scheduling(plan):
        return True
    counts = []
    for schedule in [plan.planned_full_steps(), *_other_schedules(plan)]:
        fresh = replace(plan, callbacks=deepcopy(plan.callbacks))  # one may count what it is shown
        counts.append(expected_evaluations(fresh, schedule))
    return all(count == counts[0] for count in counts)


def _other_schedules(plan: Plan) -> Iterator[frozenset[int]]:
    """With as many full steps as are planned, of which step 0 is one in any case."""
    later = range(1, len(plan.sampler.timesteps))
    size = len(plan.planned_full_steps()) - 1
    for start in range(0, len(later), size) if size else ():
        yield frozenset([0, *later[min(start, len(later) - size) :][:size]])
    random = Random(0)
    for _ in range(8):
        yield frozenset([0, *random.sample(later, size)])


class _StandIn(nn.Module):
    """As large as noise, and another at the least change of the sample: no network changes more.

    So a correction converges only where it cannot matter, as at a step with B = 0.
    """

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return math.sqrt(2) * torch.sin(1e4 * sample)


def _count(assembly: Assembly, *, full: bool) -> Work:
    model, clock = assembly.plan.model, assembly.clock
    denoiser = Denoiser(assembly.network, model.skeleton_condition(), clock)
    clock.full = full
    sample = torch.empty((1, *model.shape), device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, _low_bit_work(assembly.network, counter) as low:
        denoiser(sample, assembly.plan.sampler.timesteps[0])
    macs = _macs(counter)
    rest = macs - sum(work.macs for work in low)
    return Work(macs, rest * FULL_BITS**2 + sum(work.bit_operations for work in low))


@contextmanager
def _low_bit_work(network: nn.Module, counter: FlopCounterMode) -> Iterator[list[Work]]:
    """The work of modules that declare ``bits_per_mac``, one entry for each call of each."""
    done: list[Work] = []
    before: list[int] = []

    def enter(module: nn.Module, arguments: Any) -> None:
        before.append(_macs(counter))

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        macs = _macs(counter) - before.pop()
        done.append(Work(macs, macs * int(cast(Any, module).bits_per_mac)))

    declaring = [module for module in network.modules() if hasattr(module, "bits_per_mac")]
    handles = [module.register_forward_pre_hook(enter) for module in declaring]
    handles += [module.register_forward_hook(leave) for module in declaring]
    try:
        yield done
    finally:
        for handle in handles:
            handle.remove()


def _macs(counter: FlopCounterMode) -> int:
    return int(counter.get_total_flops()) // 2
