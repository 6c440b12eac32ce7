"""Distributed generation: make the chunks of images that are missing.

The unit of work is a chunk, a fixed range of image indices. Which process makes it, in which
order and in how many attempts leaves no trace in the images.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from iec_eval.assembly import Assembly, Plan, assemble
from iec_eval.calibration import ArtifactStore
from iec_eval.denoising import Denoiser, denoise
from iec_eval.errors import CorruptFile, IecEvalError, StorageError
from iec_eval.noise import Noise
from iec_eval.progress import Progress
from iec_eval.storage import Chunk, IndexRange, VariantFolder, missing_ranges, write_text
from iec_eval.study import ExecutionSpec


class Terminated(BaseException):
    """The process was asked to end (SIGTERM); finished chunks are on disk."""


@dataclass(frozen=True)
class Work:
    """One chunk to make: which plan, which images."""

    plan: int
    range: IndexRange


NO_WORK = Work(-1, IndexRange(0, 0))


@dataclass(frozen=True)
class Job:
    """A plan and the folder its images go to."""

    plan: Plan
    folder: VariantFolder

    def missing(self, chunk_size: int) -> list[IndexRange]:
        """Ranges that are not on disk yet."""
        return missing_ranges(self.folder.finished(), self.plan.experiment.images.count, chunk_size)


class GenerationModule(LightningModule):
    """Makes chunks; one network at a time is in memory.

    A variant that fails is recorded in its folder and skipped; the others go on. A process that
    has to stop skips the rest of its work and meets the others at the end, where all of them
    learn of it: ``ended`` is then the reason.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        execution: ExecutionSpec,
        store: ArtifactStore | None,
        progress: Progress,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self._jobs, self._execution, self._store = jobs, execution, store
        self._progress, self._shard = progress, shard
        self._current: tuple[int, Assembly] | None = None
        self._failed: set[int] = set()
        self._group: Any = None
        self.ended: BaseException | None = None

    def predict_dataloader(self) -> DataLoader[Work]:
        """This process's share of what rank zero found missing."""
        found = self._pending() if self.trainer.is_global_zero else []
        work: list[Work] = self.trainer.strategy.broadcast(found)
        mine = work[self.trainer.global_rank :: self.trainer.world_size]
        self._progress.visible = self._progress.visible and self.trainer.is_global_zero
        self._progress.start(sum(len(item.range) for item in mine))
        # Lightning skips every hook, the meeting too, of a process that has no item at all
        items = [*mine, NO_WORK]
        return DataLoader(items, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def transfer_batch_to_device(
        self, batch: Work, device: torch.device, dataloader_idx: int
    ) -> Work:
        return batch  # nothing but indices

    def on_predict_start(self) -> None:
        # Lightning's own handler only sets a flag that predict never looks at
        signal.signal(signal.SIGTERM, self._request_stop)
        if torch.distributed.is_initialized():
            # the default group gives up after minutes, a last chunk may take longer
            self._group = torch.distributed.new_group(timeout=timedelta(days=30), backend="gloo")

    def predict_step(self, batch: Work, batch_idx: int) -> None:
        if batch == NO_WORK or self.ended is not None or batch.plan in self._failed:
            return
        job = self._jobs[batch.plan]
        try:
            self._progress.describe(job.plan.experiment.name)
            job.folder.write_chunk(self._make(self._assembly(batch.plan), batch.range))
        except (StorageError, CorruptFile, Terminated) as error:
            self.ended = error  # all variants share disk, weights and processes
        except Exception as error:  # one variant's failure must not stop the others
            self._failed.add(batch.plan)
            record_failure(job.folder, error)

    def on_predict_end(self) -> None:
        self._progress.close()
        if self._group is not None:
            endings: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(endings, self.ended, self._group)
            self.ended = next((ending for ending in endings if ending is not None), None)

    def _pending(self) -> list[Work]:
        """What is missing, of this shard. Shards own fixed chunks: each looks at another time."""
        size, (index, shards) = self._execution.chunk_size, self._shard
        return [
            Work(number, part)
            for number, job in enumerate(self._jobs)
            if not job.folder.error_file.is_file()  # its calibration has failed
            for part in job.missing(size)
            if part.start // size % shards == index
        ]

    def _assembly(self, number: int) -> Assembly:
        if self._current is None or self._current[0] != number:
            self._current = None  # free the old network before the new one is read
            assembly = assemble(self._jobs[number].plan, self._store)
            assembly.network.to(self.device)
            assembly.plan.model.to(self.device)
            self._current = (number, assembly)
        return self._current[1]

    def _make(self, assembly: Assembly, part: IndexRange) -> Chunk:
        assembly.clock.reset()
        began = time.perf_counter()
        size = self._execution.batch_size
        batches = [part.indices[i : i + size] for i in range(0, len(part), size)]
        images = torch.cat([self._batch(assembly, indices) for indices in batches])
        count = assembly.clock.evaluations
        return Chunk(part, images, count.full, count.cached, time.perf_counter() - began)

    def _batch(self, assembly: Assembly, indices: range) -> torch.Tensor:
        model, sampler = assembly.plan.model, assembly.plan.sampler
        condition = model.condition(indices).to(self.device)
        denoiser = Denoiser(assembly.network, condition, assembly.clock)
        noise = Noise(assembly.plan.experiment.images.seed, indices, model.shape, self.device)
        total = len(sampler.timesteps)

        def between_steps(done: int) -> None:
            if self.ended is not None:
                raise self.ended
            self._progress.advance(len(indices) / total)

        callbacks = assembly.plan.callbacks
        latents = denoise(sampler, denoiser, noise, callbacks, between_steps=between_steps)
        if not bool(latents.isfinite().all()):
            raise ArithmeticError(
                "the sampler's latents are not finite: no image can be made of them"
            )
        return model.decode(latents).cpu()

    def _request_stop(self, signum: int, frame: Any) -> None:
        self.ended = Terminated()
        launcher = self.trainer.strategy.launcher
        if launcher is not None:  # the processes it started, which nobody else tells
            launcher.kill(signum)


def generate(
    jobs: Sequence[Job],
    execution: ExecutionSpec,
    store: ArtifactStore | None,
    *,
    progress: Progress,
    shard: tuple[int, int] = (0, 1),
) -> bool:
    """Make every missing chunk, on as many processes as ``execution`` says.

    Returns whether this process is rank zero, which raises Terminated if any was asked to stop,
    StorageError if a chunk cannot be written and CorruptFile for damaged weights. Every process
    raises KeyboardInterrupt.
    """
    set_threads(execution)
    callbacks = [callback for job in jobs for callback in job.plan.callbacks]
    module = GenerationModule(jobs, execution, store, progress, shard)
    with _quiet_lightning():
        trainer = Trainer(
            accelerator=execution.accelerator,
            devices=execution.devices,
            num_nodes=execution.num_nodes,
            strategy=execution.strategy,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        _predict(trainer, module)
    if module.ended is not None and trainer.is_global_zero:
        raise module.ended
    return bool(trainer.is_global_zero)


def set_threads(execution: ExecutionSpec) -> None:
    """CPU threads of this process: as asked, or torch's choice within its share of the cores."""
    share = max(1, len(os.sched_getaffinity(0)) // _processes(execution))
    torch.set_num_threads(execution.threads or min(torch.get_num_threads(), share))


def use_all_threads(execution: ExecutionSpec) -> None:
    """The threads of all processes of this machine for the one that works alone."""
    if execution.threads is not None:
        torch.set_num_threads(execution.threads * _processes(execution))


def _processes(execution: ExecutionSpec) -> int:
    return execution.devices if isinstance(execution.devices, int) else 1


def is_rank_zero() -> bool:
    """Whether this process is the first of those that work together, as Lightning sees it."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def calibration_device(execution: ExecutionSpec) -> torch.device:
    """The one device that calibration runs on: the first that generation would use."""
    return Fabric(accelerator=execution.accelerator, devices=1, num_nodes=1).device


def launched_in_parallel() -> bool:
    """Whether something else (srun, torchrun) started this process as one of several."""
    tasks = os.environ.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in os.environ else "1"
    return max(int(tasks), int(os.environ.get("WORLD_SIZE", "1"))) > 1


def record_failure(folder: VariantFolder, error: Exception) -> None:
    """Leave the reason in the variant's folder: one line, then where it happened."""
    reason = str(error) if isinstance(error, IecEvalError) else f"{type(error).__name__}: {error}"
    first_line = (reason.splitlines() or [type(error).__name__])[0]
    write_text(folder.error_file, f"{first_line}\n\n{traceback.format_exc()}")


def _predict(trainer: Trainer, module: GenerationModule) -> None:
    try:
        trainer.predict(module, return_predictions=False)
    except SystemExit as error:  # Lightning turns Ctrl-C into exit(1)
        raise KeyboardInterrupt from error


def _as_it_is(item: Work) -> Work:
    return item


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's hints on workers and hardware, which are not about our users."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
