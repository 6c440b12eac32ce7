"""Distributed generation: make the files that are missing, images and what networks see in them.

The unit of work is a chunk, a fixed range of image indices. Which process makes it, in which
order and in how many attempts leaves no trace in the images.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from iec_eval import processes, ranks
from iec_eval.assembly import Assembly, assemble
from iec_eval.calibration import ArtifactStore
from iec_eval.claims import Claims
from iec_eval.denoising import Denoiser, denoise
from iec_eval.errors import (
    CorruptChunk,
    CorruptFile,
    IecEvalError,
    MissingArtifact,
    StorageError,
)
from iec_eval.jobs import Job, stored_features
from iec_eval.noise import Noise
from iec_eval.progress import Progress
from iec_eval.runs import Chunk, IndexRange, Spent, VariantFolder
from iec_eval.stopping import StopRequest, Terminated
from iec_eval.study import ExecutionSpec
from iec_eval.work import Queue, Share, Task

# of which torch before 2.8 has only the first
DEVICE_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
STOPPING_SECONDS = 600.0  # what the other processes get to finish their micro-batches


class GenerationModule(LightningModule):
    """Makes what it claims; one denoising network at a time is in memory.

    A variant that fails is recorded in its folder and skipped; the others go on. ``ended`` is why
    a process gave up before all was done.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        execution: ExecutionSpec,
        store: ArtifactStore | None,
        progress: Progress,
        claims: Claims,
        share: Share,
    ) -> None:
        super().__init__()
        self._execution, self._store, self._progress = execution, store, progress
        self._claims = claims
        self._current: tuple[int, Assembly] | None = None
        self._stop = StopRequest()
        self._queue = Queue(
            jobs, execution.chunk_size, share, claims, stopped=lambda: bool(self._stop)
        )
        self.ended: BaseException | None = None

    def predict_dataloader(self) -> DataLoader[int]:
        """One item for every process: the queue, from which each takes what it can."""
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]

    def on_predict_start(self) -> None:
        launcher = self.trainer.strategy.launcher
        if isinstance(launcher, ranks.Launcher):
            launcher.met.set()
            self._stop.pass_on_to(launcher.kill)
        # Lightning's own handlers wait for the other processes, which may be gone
        self._stop.listen()
        self._progress.visible = self._progress.visible and processes.leads()
        if self._progress.visible:
            self._queue.tell = self._progress.left

    def predict_step(self, batch: int, batch_idx: int) -> None:
        try:
            for task in self._queue:
                self._do(task)
            self._stop.check()
        except (StorageError, CorruptFile, Terminated) as error:
            self.ended = error  # all variants share disk, weights and processes

    def _do(self, task: Task) -> None:
        self._progress.describe(task.job.name)
        try:
            if task.network is None:
                self._make(task)
            else:
                self._look(task)
        except CorruptChunk as error:
            processes.say(str(error))  # it is missing now, and will be found missing
        except (StorageError, CorruptFile):
            raise
        except Exception as error:  # one variant's failure must not stop the others
            # an artifact that is missing because its calibration failed is no reason of its own
            if not isinstance(error, MissingArtifact) or task.job.folder.failure() is None:
                record_failure(task.job.folder, error, self._claims.owner.launch)
            self._queue.give_up(task.job)

    def _make(self, task: Task) -> None:
        """Make a chunk, going on from what an earlier process has left of it."""
        assembly, folder = self._assembly(task), task.job.folder
        pieces = folder.read_parts(task.range)
        missing = _batches(task.range, [p.range for p in pieces], self._execution)
        for indices in missing:
            pieces.append(self._piece(assembly, indices))
            if indices != missing[-1]:
                folder.write_part(pieces[-1])
                self._stop.check()
        folder.write_chunk(Chunk.joined(pieces))

    def _look(self, task: Task) -> None:
        """Extract features, and delete the images if nobody wants them any more."""
        job, network = task.job, task.network
        assert network is not None
        network.load(self.device)
        try:
            stored_features(job.folder, task.range, network)
        except MissingArtifact:  # deleted meanwhile by a run that wants other features
            return
        self._progress.advance(len(task.range))
        if job.may_drop(task.range):
            job.folder.drop_images(task.range)

    def _assembly(self, task: Task) -> Assembly:
        if self._current is None or self._current[0] != task.number:
            self._current = None  # free the old network before the new one is read
            assembly = assemble(task.job.plan, self._store)
            assembly.network.to(self.device)
            assembly.plan.model.to(self.device)
            self._current = (task.number, assembly)
        return self._current[1]

    def _piece(self, assembly: Assembly, part: IndexRange) -> Chunk:
        assembly.clock.reset()
        began = time.perf_counter()
        images = self._batch(assembly, part.indices)
        count = assembly.clock.evaluations
        spent = Spent(count.full, count.cached, time.perf_counter() - began)
        return Chunk(part, images, spent)

    def _batch(self, assembly: Assembly, indices: range) -> torch.Tensor:
        model, sampler = assembly.plan.model, assembly.plan.sampler
        condition = model.condition(indices).to(self.device)
        denoiser = Denoiser(assembly.network, condition, assembly.clock)
        noise = Noise(assembly.plan.experiment.images.seed, indices, model.shape, self.device)
        total = len(sampler.timesteps)

        def between_steps(done: int) -> None:
            self._stop.check(urgent=True)
            self._progress.advance(len(indices) / total)

        callbacks = assembly.plan.callbacks
        latents = denoise(sampler, denoiser, noise, callbacks, between_steps=between_steps)
        if not bool(latents.isfinite().all()):
            raise ArithmeticError(
                "the sampler's latents are not finite: no image can be made of them"
            )
        return model.decode(latents).cpu()


def _batches(
    whole: IndexRange, there: Sequence[IndexRange], execution: ExecutionSpec
) -> list[IndexRange]:
    """What is missing of a chunk, in micro-batches.

    They are cut where they would be had the chunk never been begun before, so that images stay
    with the company they had.
    """
    size, edge = execution.batch_size, whole.start // execution.chunk_size * execution.chunk_size
    missing, position = [], whole.start
    for part in [*there, IndexRange(whole.stop, whole.stop)]:
        while position < part.start:
            cut = edge + ((position - edge) // size + 1) * size
            missing.append(IndexRange(position, min(cut, part.start)))
            position = missing[-1].stop
        position = part.stop
    return missing


def generate(
    jobs: Sequence[Job],
    execution: ExecutionSpec,
    store: ArtifactStore | None,
    claims: Claims,
    *,
    progress: Progress,
    share: Share,
    alone: bool = False,
) -> None:
    """Make every missing file that ``share`` allows, on as many processes as ``execution`` says.

    If ``alone``, on this process only, whoever else there may be.

    Raises Terminated if this process was asked to stop, StorageError if a file cannot be written,
    CorruptFile for damaged weights and KeyboardInterrupt.
    """
    set_threads(execution)
    callbacks = [callback for job in jobs for callback in job.plan.callbacks]
    module = GenerationModule(jobs, execution, store, progress, claims, share)
    with ranks.quiet_lightning(), ranks.named(claims.owner.launch), claims:
        trainer = ranks.trainer(execution, callbacks, alone=alone)
        _predict(trainer, module)
        _dismiss(trainer.strategy.launcher, module.ended)
    if module.ended is not None:
        raise module.ended


def set_threads(execution: ExecutionSpec) -> None:
    """CPU threads of this process: as asked, or torch's choice within its share of the cores."""
    share = max(1, _cores() // _processes(execution))
    if processes.started_by_slurm():  # which counts for each task, and may have bound it to them
        share = int(os.environ.get("SLURM_CPUS_PER_TASK", share))
    torch.set_num_threads(execution.threads or min(torch.get_num_threads(), share))


def _cores() -> int:
    """Those that this process may use; where the system does not tell, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_threads(execution: ExecutionSpec) -> None:
    """The threads of all processes of this machine for the one that works alone."""
    if execution.threads is not None:
        torch.set_num_threads(execution.threads * _processes(execution))


def _processes(execution: ExecutionSpec) -> int:
    here, _ = ranks.asked_for(execution)
    return here if isinstance(here, int) else 1


def record_failure(folder: VariantFolder, error: Exception, launch: str) -> None:
    """Leave the reason in the variant's folder: one line, then where it happened.

    Where the fault may be this process's device (no memory left, or an error that stays), it is no
    reason for other processes of the launch to pass the variant over.
    """
    if isinstance(error, DEVICE_ERRORS):
        launch = f"{launch}, one process"
    reason = str(error) if isinstance(error, IecEvalError) else f"{type(error).__name__}: {error}"
    first_line = (reason.splitlines() or [type(error).__name__])[0]
    folder.write_failure(first_line, traceback.format_exc(), launch)


def _predict(trainer: Trainer, module: GenerationModule) -> None:
    try:
        trainer.predict(module, return_predictions=False)
    except SystemExit as error:  # Lightning turns Ctrl-C into exit(1)
        raise KeyboardInterrupt from error


def _dismiss(launcher: object, ended: BaseException | None) -> None:
    """Wait for the processes that this one has started; whatever else ended it ends them too."""
    if not isinstance(launcher, ranks.Launcher):
        return
    if ended is None:
        launcher.join()
        return
    if not isinstance(ended, Terminated):  # of which they were told at once: twice is urgent
        launcher.kill(signal.SIGTERM)
    launcher.join(STOPPING_SECONDS)
