"""From a plan to a network that denoises: weights read, parts calibrated and applied in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from iec_eval.calibration import (
    CPU,
    ArtifactStore,
    Bench,
    Calibrated,
    Draft,
    draft_key,
    next_key,
    obtain,
    root_key,
)
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.efficiency.base import EfficiencyMethod
from iec_eval.errors import ConfigError, IecEvalError
from iec_eval.fingerprints import model_identity
from iec_eval.planning import Plan
from iec_eval.progress import Progress
from iec_eval.runs import RunFolder


@dataclass(frozen=True)
class Assembly:
    """A plan with its network: ready to denoise."""

    plan: Plan
    network: nn.Module
    clock: Clock


def assemble(plan: Plan, store: ArtifactStore | None = None) -> Assembly:
    """Read the weights and apply the methods in order.

    Raises MissingArtifact if one of them has not been calibrated yet.
    """
    return _apply(plan, plan.model.load(), store)


def assemble_skeleton(plan: Plan) -> Assembly:
    """The same on the meta device, for counting: nothing is calibrated or looked up."""
    clock = Clock(len(plan.sampler.timesteps))
    network = plan.model.skeleton()
    for part in plan.parts():
        clock.full_steps &= frozenset(part.full_steps(clock.total, {}))
        network = part.apply(network, clock, {})
    return Assembly(plan, network.eval(), clock)


def calibrate(
    plan: Plan,
    store: ArtifactStore | None,
    *,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> Assembly:
    """Assemble, calibrating what is not in the store, part by part; one process at a time."""
    return _apply(plan, plan.model.load(), store, Calibrator(device, progress))


def artifact_keys(plan: Plan) -> list[tuple[Calibrated, str]]:
    """What has to be calibrated for a row, with the keys of the artifacts, in order."""
    return [(part, key) for part, key in _keyed(plan) if part.needs_calibration]


def _keyed(plan: Plan) -> list[tuple[EfficiencyMethod | DenoisingCallback, str]]:
    """The methods' parts, then the callbacks, each with the key of what it may calibrate."""
    row = plan.experiment
    model = model_identity(plan.model, plan.identity)
    key = root_key(model, plan.sampler, row.calibration.identity())
    parts: list[EfficiencyMethod | DenoisingCallback] = [*plan.parts(), *plan.callbacks]
    keyed = []
    for part in parts:
        key = next_key(key, part)
        keyed.append((part, key))
    return keyed


def full_steps(
    plan: Plan,
    store: RunFolder,
    *,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> frozenset[int]:
    """Steps that run the whole network; a schedule that is not calibrated yet is.

    What else the row calibrates is not, unless the schedule is calibrated on it.
    """
    positions = scheduling(plan)
    if missing_for_schedule(plan, store):
        calibrator = Calibrator(device, progress)
        _apply(plan, plan.model.load(), store, calibrator, max(positions) + 1)
    keyed = _keyed(plan)
    return plan.full_steps({i: obtain(*keyed[i], None, store) for i in positions})


def uncalibrated(plan: Plan, store: RunFolder) -> list[str]:
    """Names of the parts that are not calibrated yet, in order."""
    return [part.name for part, key in artifact_keys(plan) if not store.has(key)]


def missing_for_schedule(plan: Plan, store: RunFolder) -> list[str]:
    """Parts that have to be calibrated before it is known which steps run the whole network."""
    keyed = _keyed(plan)[: max(scheduling(plan), default=-1) + 1]
    return [part.name for part, key in keyed if part.needs_calibration and not store.has(key)]


def scheduling(plan: Plan) -> list[int]:
    """Positions of the parts whose calibration decides which steps are full."""
    total = len(plan.sampler.timesteps)
    return [
        i
        for i, part in enumerate(plan.parts())
        if part.needs_calibration and len(part.full_steps(total, {})) < total
    ]


def missing_artifacts(plan: Plan, store: RunFolder) -> list[str]:
    """Keys of the artifacts that are not calibrated yet, in order."""
    return [key for _, key in artifact_keys(plan) if not store.has(key)]


@dataclass(frozen=True)
class Calibrator:
    """Makes the bench of each part."""

    device: torch.device
    progress: Progress | None

    def bench(
        self,
        plan: Plan,
        network: nn.Module,
        clock: Clock,
        key: str,
        store: ArtifactStore | None,
        callbacks: Sequence[DenoisingCallback],
    ) -> Bench:
        progress = self.progress or Progress("steps", visible=False)
        plan.model.to(self.device)
        return Bench(
            network=network.to(self.device).eval(),
            clock=clock,
            model=plan.model,
            sampler=plan.sampler,
            seed=plan.experiment.calibration.seed,
            images=plan.experiment.calibration.images,
            device=self.device,
            batch_size=plan.experiment.calibration.batch_size,
            progress=progress,
            draft=Draft(store, draft_key(key)),
            callbacks=tuple(callbacks),
        )


def check_fit(plan: Plan) -> None:
    """Apply the parts to the network without weights.

    A part that fails in another way than by refusing may only mind that there are no weights. Then
    its work is not counted, and the row fails alone if it fails on the real network too.

    Raises ConfigError or Incompatible, naming the row, if they do not fit it.
    """
    try:
        if plan.methods:
            assemble_skeleton(plan)
    except ConfigError as error:
        error.args = (f"{plan.experiment.name}: {error}",)
        raise
    except IecEvalError:
        raise
    except Exception:  # anything that a plugin does; ``cost.Uncounted`` tells it
        return


def _apply(
    plan: Plan,
    network: nn.Module,
    store: ArtifactStore | None,
    calibrator: Calibrator | None = None,
    parts: int | None = None,
) -> Assembly:
    """All parts, or the first so many."""
    clock = Clock(len(plan.sampler.timesteps))
    earlier: list[DenoisingCallback] = []
    for part, key in _keyed(plan)[:parts]:
        bench = None
        if calibrator is not None and part.needs_calibration:
            bench = calibrator.bench(plan, network, clock, key, store, earlier)
            bench.progress.describe(f"{plan.experiment.name}: calibrating {part.name}")
        artifact = obtain(part, key, bench, store)
        if isinstance(part, DenoisingCallback):
            part.use(artifact)
            earlier.append(part)
        else:
            clock.full_steps &= frozenset(part.full_steps(clock.total, artifact))
            network = part.apply(network, clock, artifact)
    clock.reset()
    return Assembly(plan, network.eval(), clock)
