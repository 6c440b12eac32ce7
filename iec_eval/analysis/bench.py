"""Rows as they are deployed, their twins, and trajectories of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iec_eval.assembly import Assembly, calibrate, full_steps
from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.callbacks.iec import corrected_steps
from iec_eval.denoising import Denoiser, Step, denoise
from iec_eval.errors import Incompatible
from iec_eval.noise import Noise
from iec_eval.options import BaseOptions
from iec_eval.planning import Plan, plan_like
from iec_eval.plugins import Registry
from iec_eval.progress import Progress
from iec_eval.runs import RunFolder
from iec_eval.study import Part

PAPER: Part = {"name": "iec", "preset": "paper"}


@dataclass(frozen=True)
class Subject:
    """A row that is analyzed, and the folder its results go to.

    ``full_steps`` run the whole network; as planned, until it is known what calibration chooses.
    """

    name: str
    folder: Path
    plan: Plan
    full_steps: frozenset[int]

    @property
    def total(self) -> int:
        """Steps of its sampler."""
        return len(self.plan.sampler.timesteps)


def correctors(plan: Plan) -> list[tuple[int, Any]]:
    """The callbacks that correct, as IEC does, with their positions: those that tell of it."""
    found: list[tuple[int, Any]] = list(enumerate(plan.callbacks))
    return [(i, callback) for i, callback in found if hasattr(callback, "on_correction")]


def uncorrected(plan: Plan, registry: Registry) -> Plan:
    """The same row without its correctors; the row itself if it has none."""
    kept = other_callbacks(plan)
    return plan if kept == plan.experiment.callbacks else plan_like(plan, registry, callbacks=kept)


def other_callbacks(plan: Plan) -> list[Part]:
    """The row's callbacks but its correctors, as the study spells them."""
    positions = {i for i, _ in correctors(plan)}
    return [part for i, part in enumerate(plan.experiment.callbacks) if i not in positions]


def corrected(plan: Plan, registry: Registry) -> Plan:
    """The row itself if it corrects; else with the paper's IEC added.

    Raises Incompatible if the row cannot be corrected.
    """
    if correctors(plan):
        return plan
    return plan_like(plan, registry, callbacks=[*plan.experiment.callbacks, PAPER])


def why_uncorrectable(plan: Plan, registry: Registry) -> str | None:
    """Why the row can have no correction, its own or the paper's; None if it can."""
    try:
        corrected(plan, registry)
    except Incompatible as error:
        return str(error).removeprefix(f"{plan.experiment.name}: ")
    return None


def full_precision_twin(plan: Plan, registry: Registry) -> Plan:
    """The row's sampler with the plain network."""
    return plan_like(plan, registry, efficiency=[], callbacks=[])


def corrected_twin(subject: Subject, registry: Registry) -> Plan:
    """The row's sampler with the plain network and the row's corrector, else the paper's.

    IEC corrects the same steps in both, those that are full in the row.
    """
    plan = subject.plan
    parts = plan.experiment.callbacks
    own = [_at_steps_of(subject, parts[i], callback.options) for i, callback in correctors(plan)]
    callbacks = own or [_at_steps_of(subject, PAPER)]
    return plan_like(plan, registry, efficiency=[], callbacks=callbacks)


def _at_steps_of(subject: Subject, part: Part, options: Any = None) -> Part:
    """IEC with the steps listed that it corrects in this row; the part as it is if all are full."""
    full, total = subject.full_steps, subject.total
    if part["name"] != PAPER["name"] or len(full) == total:
        return part
    where = "full" if options is None else options.where
    return {**part, "where": sorted(corrected_steps(where, total, full))}


def first_image(plan: Plan) -> int:
    """Where the indices of the analyzed noise begin.

    It is a calibration's noise, since what is recommended must not be fitted to images that are
    scored; where both seeds are the same, it begins after what the row's methods were shown.
    """
    row = plan.experiment
    return row.calibration.images if row.calibration.seed == row.images.seed else 0


def question_of(plan: Plan, **more: Any) -> dict[str, Any]:
    """What decides a measurement of a row, for the name of its file."""
    first = first_image(plan)
    return {"fingerprint": plan.fingerprint, **({"first_image": first} if first else {}), **more}


class Bench:
    """Networks with their methods applied, one in memory at a time, and what they do.

    What is not calibrated yet is calibrated, into the run's own artifacts.
    """

    def __init__(self, run: RunFolder, device: torch.device, progress: Progress) -> None:
        self.device, self.progress = device, progress
        self._run = run
        self._current: Assembly | None = None

    def full_steps(self, plan: Plan) -> frozenset[int]:
        """Steps that run the row's whole network; a schedule is calibrated if need be."""
        steps = Progress("calibration steps", visible=self.progress.visible)
        try:
            return full_steps(plan, self._run, device=self.device, progress=steps)
        finally:
            steps.close()

    def assembly(self, plan: Plan) -> Assembly:
        """The row's network on the bench's device."""
        if self._current is None or self._current.plan.fingerprint != plan.fingerprint:
            self._current = None  # free the old network before the new one is read
            steps = Progress("calibration steps", visible=self.progress.visible)
            made = calibrate(plan, self._run, device=self.device, progress=steps)
            steps.close()
            made.network.to(self.device).requires_grad_(False)
            plan.model.to(self.device)
            self._current = made
        return self._current

    def denoiser(self, plan: Plan, images: int) -> Denoiser:
        """The row's prediction for its images 0 .. ``images - 1``."""
        assembly = self.assembly(plan)
        condition = plan.model.condition(range(images)).to(self.device)
        return Denoiser(assembly.network, condition, assembly.clock)

    def run(
        self,
        plan: Plan,
        images: int,
        after: Sequence[DenoisingCallback] = (),
        before: Sequence[DenoisingCallback] = (),
    ) -> Tensor:
        """Final latents of the row's first images, observed before and after its callbacks."""
        denoiser = self.denoiser(plan, images)
        callbacks = [*before, *self.assembly(plan).plan.callbacks, *after]
        with torch.no_grad():
            seed, shape = plan.experiment.images.seed, plan.model.shape
            start = first_image(plan)
            indices = range(start, start + images)
            noise = Noise(seed, indices, shape, self.device, calibration=True)
            return denoise(plan.sampler, denoiser, noise, callbacks)

    def trajectory(self, plan: Plan, images: int) -> Tensor:
        """All states ``[T + 1, B, C, H, W]`` on the CPU as the network is shown them, x_T first."""
        recorder = _Recorder(self.progress)
        self.run(plan, images, [recorder])
        return torch.stack(recorder.states)


class _Recorder(DenoisingCallback):
    """Keeps the state before every step, and the one after the last; it stands at the end."""

    name = "trajectory-recorder"

    def __init__(self, progress: Progress) -> None:
        super().__init__(BaseOptions())
        self._progress = progress
        self.states: list[Tensor] = []

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        self.states.append(step.shown(step.sample).cpu().clone())
        if step.last:
            self.states.append(step.shown(step.preview(prediction), level="next").cpu())
        self._progress.advance(1)
        return prediction
