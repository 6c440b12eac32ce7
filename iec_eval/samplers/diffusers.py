"""Any of diffusers' schedulers as a sampler: a step works on a copy, so it leaves no trace."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal, get_type_hints
from unittest.mock import patch

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from torch import Tensor

from iec_eval.errors import ConfigError, Incompatible
from iec_eval.noise import Draw
from iec_eval.options import BaseOptions
from iec_eval.samplers.base import Sampler, State
from iec_eval.schedule import NoiseSchedule

STAGES = (
    "a step of its method takes two evaluations at different times, and a correction would act "
    "between them; take a multistep or a first-order scheduler"
)
WARM_UP = (
    "its first step takes two evaluations, and a correction would act between them; the sampler "
    "plms is the same method with the correction defined"
)
# every scheduler that is tested here, with why IEC cannot correct it
SCHEDULERS: Mapping[str, str] = {
    "DDIMScheduler": "",
    "DDPMScheduler": "",
    "DEISMultistepScheduler": "",
    "DPMSolverMultistepScheduler": "",
    "DPMSolverSinglestepScheduler": STAGES,
    "EulerAncestralDiscreteScheduler": "",
    "EulerDiscreteScheduler": "",
    "FlowMatchEulerDiscreteScheduler": "",
    "FlowMatchHeunDiscreteScheduler": STAGES,
    "HeunDiscreteScheduler": STAGES,
    "KDPM2AncestralDiscreteScheduler": STAGES,
    "KDPM2DiscreteScheduler": STAGES,
    "LMSDiscreteScheduler": "",
    "PNDMScheduler": WARM_UP,
    "UniPCMultistepScheduler": "",
}
PREDICTION_TYPES = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "sample": "sample",
    "flow": "flow_prediction",
}
OURS = frozenset(
    {
        "num_train_timesteps",
        "trained_betas",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "prediction_type",
    }
)


class DiffusersOptions(BaseOptions):
    """Options of a scheduler of diffusers."""

    scheduler: str = Field(
        "DPMSolverMultistepScheduler", description="class name; this one is DPM-Solver++(2M)"
    )
    steps: int = Field(20, ge=1, description="inference steps, as its set_timesteps takes them")
    prediction: Literal["epsilon", "v", "sample", "flow"] = Field(
        "epsilon", description="what the model predicts"
    )
    config: dict[str, Any] = Field(
        {}, description="its own options; clip_sample is off unless it is switched on here"
    )

    @field_validator("scheduler")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SCHEDULERS:
            near = get_close_matches(name, SCHEDULERS, n=1)
            near = near or get_close_matches(f"{name}Scheduler", SCHEDULERS, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"wanted one of {', '.join(SCHEDULERS)}{guess}")
        return name


@dataclass(frozen=True)
class Position:
    """A scheduler as it is before step ``index``; nobody changes it."""

    scheduler: Any
    index: int


class DiffusersSampler(Sampler):
    """A scheduler of the library diffusers: DPM-Solver++, UniPC, Euler, Heun, DEIS and more.

    It is given the model's own noise schedule. Random draws are those of the run, a function of
    seed, image and step.
    """

    name = "diffusers"
    version = 2  # 1 showed a correction's estimate to the network scaled like the step's own sample
    Options = DiffusersOptions
    options: DiffusersOptions

    def __init__(self, options: DiffusersOptions, schedule: NoiseSchedule) -> None:
        super().__init__(options, schedule)
        self.predictions = frozenset({options.prediction})
        self._scheduler = _scheduler(options, schedule)
        self.timesteps = tuple(t.item() for t in self._scheduler.timesteps)
        config = self._scheduler.config
        one_stage = config.get("solver_order") == 1
        self.uncorrectable = "" if one_stage else SCHEDULERS[options.scheduler]
        self.clips = bool(config.get("clip_sample")) or bool(config.get("thresholding"))

    def other_steps(self, number: int) -> Mapping[str, Any]:
        """``steps``. Raises Incompatible for DDIMScheduler if they do not follow each other.

        A step of it goes from t to ``t - len // steps``, wherever the next one begins. If its own
        steps do not meet either, other numbers are no worse.
        """
        changed = super().other_steps(number)
        if self.options.scheduler == "DDIMScheduler" and _meet(self.timesteps, len(self.schedule)):
            options, length = self.options.model_copy(update=changed), len(self.schedule)
            if not _meet(_scheduler(options, self.schedule).timesteps.tolist(), length):
                raise Incompatible(
                    f"{number} steps of DDIMScheduler, each of {length // number} timesteps, do "
                    f"not follow each other; numbers that divide {length} do"
                )
        return changed

    def start(self, noise: Tensor) -> State:
        sigma = getattr(self._scheduler, "init_noise_sigma", 1.0)
        return State(noise * sigma, Position(self._scheduler, 0))

    def network_input(self, state: State, index: int, sample: Tensor) -> Tensor:
        position: Position = state.memory
        if not hasattr(position.scheduler, "scale_model_input"):
            return sample
        if index < position.index:
            position = Position(self._scheduler, 0)
        scheduler = _copy(position.scheduler)
        _walk(scheduler, range(position.index, index), torch.zeros_like(state.sample))
        # it counts its steps, and knows by this timestep only where none has been taken
        timestep = scheduler.timesteps[min(index, len(self.timesteps) - 1)]
        scaled: Tensor = scheduler.scale_model_input(sample, timestep)
        return scaled

    def step(self, state: State, index: int, prediction: Tensor, draw: Draw) -> State:
        scheduler = _copy(state.memory.scheduler)
        sample = _advance(scheduler, index, prediction, state.sample, lambda: draw.value)
        return State(sample, Position(scheduler, index + 1))


def _meet(timesteps: Sequence[float], length: int) -> bool:
    """Whether each of DDIMScheduler's steps ends where the next one begins."""
    step = length // len(timesteps)
    return all(now - then == step for now, then in pairwise(timesteps))


def _copy(scheduler: Any) -> Any:
    """Another scheduler in the same position; the frozen configuration, most of it, is shared."""
    return deepcopy(scheduler, {id(scheduler.config): scheduler.config})


def _advance(
    scheduler: Any, index: int, prediction: Tensor, sample: Tensor, noise: Callable[[], Tensor]
) -> Tensor:
    """The sample after step ``index``; the scheduler moves on."""
    scheduler.is_scale_input_called = True  # on another copy; else some of them warn
    with _drawing(scheduler, noise):
        timestep = scheduler.timesteps[index]
        after: Tensor = scheduler.step(prediction, timestep, sample, return_dict=False)[0]
    return after


def _walk(scheduler: Any, steps: Iterable[int], blank: Tensor) -> Tensor:
    """Take steps over a blank sample, where nothing but the scheduler's position is wanted."""
    sample = blank
    for index in steps:
        sample = _advance(scheduler, index, blank, sample, lambda: blank)
    return sample


def _scheduler(options: DiffusersOptions, schedule: NoiseSchedule) -> Any:
    """The scheduler with its timesteps set, after a rehearsal on one blank pixel.

    Raises ConfigError for options it does not have, refuses or stumbles over.
    """
    import diffusers

    cls = getattr(diffusers, options.scheduler)
    known = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    _check_prediction(options, known)
    _check_config(options, {name: get_type_hints(cls.__init__).get(name, Any) for name in known})
    given: dict[str, Any] = {"clip_sample": False, "use_flow_sigmas": options.prediction == "flow"}
    given |= options.config
    given |= {
        "num_train_timesteps": len(schedule),
        "trained_betas": _betas(schedule),
        "prediction_type": PREDICTION_TYPES[options.prediction],
    }
    try:
        scheduler = cls(**{key: value for key, value in given.items() if key in known})
        scheduler.set_timesteps(options.steps)
        last = _walk(_copy(scheduler), range(len(scheduler.timesteps)), torch.zeros(1, 1, 1, 1))
    except Exception as error:  # whatever a scheduler does with what it does not expect
        raise ConfigError(f"diffusers: {options.scheduler} refuses its options: {error}") from error
    if not last.isfinite().all():
        raise ConfigError(
            f"diffusers: {options.scheduler} does not stay finite with {options.steps} steps and "
            "these options; take another number of steps"
        )
    return scheduler


def _check_prediction(options: DiffusersOptions, known: Iterable[str]) -> None:
    if options.prediction == "flow" and not {"use_flow_sigmas", "shift"} & set(known):
        raise ConfigError(f"diffusers: {options.scheduler} knows no flow matching")
    if options.prediction != "flow" and options.scheduler.startswith("FlowMatch"):
        raise ConfigError(
            f"diffusers: {options.scheduler} takes a model that predicts a flow; wanted "
            f"prediction: flow, got {options.prediction}"
        )


def _check_config(options: DiffusersOptions, kinds: Mapping[str, Any]) -> None:
    """``kinds`` are the types of the scheduler's own options, by name."""
    where = f"diffusers: config of {options.scheduler}"
    for key, value in options.config.items():
        if key in OURS:
            raise ConfigError(f"{where}: {key} comes from the model and the sampler's options")
        if key not in kinds:
            near = get_close_matches(key, kinds, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            wanted = ", ".join(sorted(kinds.keys() - OURS))
            raise ConfigError(f"{where}: unknown key {key!r}{guess} (known: {wanted})")
        adapter = TypeAdapter(kinds[key], config=ConfigDict(arbitrary_types_allowed=True))
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ConfigError(f"{where}: {key}: {message}, got {value!r}") from None


def _betas(schedule: NoiseSchedule) -> list[float]:
    """1 - abar_t / abar_(t-1), with abar = 1 before the first."""
    abar = schedule.alphas_cumprod.tolist()
    return [1 - now / before for now, before in zip(abar, [1.0, *abar[:-1]], strict=True)]


@contextmanager
def _drawing(scheduler: Any, noise: Callable[[], Tensor]) -> Iterator[None]:
    """Within the block the scheduler's random numbers are ``noise()``, and only once."""
    module = sys.modules[type(scheduler).__module__]
    if not hasattr(module, "randn_tensor"):
        yield
        return
    drawn = list[bool]()

    def value(shape: Any, *_: Any, device: Any = None, dtype: Any = None, **__: Any) -> Tensor:
        if drawn:
            raise RuntimeError(f"{type(scheduler).__name__} draws twice in one step")
        drawn.append(True)
        return noise().to(device=device, dtype=dtype).reshape(shape)

    with patch.object(module, "randn_tensor", value):
        yield
