"""DeepCache (Ma et al., CVPR 2024): reuse the deep feature of the last full step.

Decoder resnets are numbered from the output, u_1 being the last. With cut c, a full step stores
the hidden state that enters u_c, before it is joined with its skip; a cached step runs only the
encoder part whose skips u_c..u_1 need, takes the stored state, and goes on from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.efficiency.schedules import (
    centred_power_schedule,
    dps_schedule,
    power_schedule,
    uniform_schedule,
)
from iec_eval.efficiency.unet_walk import Context, UNetWalk
from iec_eval.errors import ConfigError
from iec_eval.options import BaseOptions, UsedBy

if TYPE_CHECKING:
    from iec_eval.calibration import Bench

TOGETHER = 8  # images whose features of 2N steps are in memory at once


class DeepCacheOptions(BaseOptions):
    """Options of DeepCache."""

    used_by: ClassVar[UsedBy] = {
        "schedule": {
            "power": ("power", "centred-power"),
            "center": ("centred-power",),
            "schedule_images": ("dps",),
        }
    }

    interval: int = Field(
        ge=1,
        description="every N-th step is full, starting with step 0; on average, where the "
        "schedule is not uniform",
    )
    cut: int = Field(
        1,
        ge=1,
        description="decoder resnets that every step recomputes, counted from the output; "
        "the released code uses 4 for the CIFAR-10 DDPM and 1 for latent diffusion",
    )
    schedule: Literal["uniform", "power", "centred-power", "dps"] = Field(
        "uniform",
        description="which steps are full: every N-th, denser at the start, densest around a "
        "step, or those whose features stand best for the steps after them (CacheQuant; this one "
        "is calibrated)",
    )
    power: float = Field(
        1.5, ge=1, description="of the schedules power and centred-power; 1 is about uniform"
    )
    center: int = Field(0, ge=0, description="step around which centred-power is densest")
    schedule_images: int = Field(
        128, ge=1, description="for dps: calibration images whose features are compared, at most"
    )


class DeepCache(EfficiencyMethod):
    """Skip the deep part of the U-Net on all but about every N-th step."""

    name = "deepcache"
    Options = DeepCacheOptions
    slot = "cacher"
    options: DeepCacheOptions

    @property
    def needs_calibration(self) -> bool:
        return self.options.schedule == "dps"

    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        """For ``dps`` alone: the full steps that lose least, from one pass with every step full.

        T 2N distances of features are measured, each once, and summed over the images.
        """
        if not self.needs_calibration:
            return {}
        interval, total = self.options.interval, bench.clock.total
        cached = CachedUNet(bench.network, self.options.cut, bench.clock)
        observer = FeatureDistances(cached, total, min(2 * interval, total))
        on_features, images = replace(bench, network=cached), self.options.schedule_images
        with bench.every_step_full():
            size = min(TOGETHER, bench.batch_size)
            on_features.run([observer], batch_size=size, images=images)
        return {"full_steps": torch.tensor(dps_schedule(observer.distances, interval))}

    def full_steps(self, total: int, artifact: Artifact) -> Collection[int]:
        """As the schedule says; before ``dps`` is calibrated, as many as it will have."""
        options = self.options
        if options.interval > total:
            raise ConfigError(
                f"deepcache: interval {options.interval} is longer than the run of {total} "
                f"steps; give at most {total}"
            )
        if options.center >= total:
            raise ConfigError(
                f"deepcache: center {options.center} is beyond the run of {total} steps; "
                f"give at most {total - 1}"
            )
        if options.schedule == "power":
            return power_schedule(total, options.interval, options.power)
        if options.schedule == "centred-power":
            return centred_power_schedule(total, options.interval, options.power, options.center)
        if options.schedule == "dps" and artifact:
            return cast(list[int], artifact["full_steps"].tolist())
        return uniform_schedule(total, options.interval)

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return CachedUNet(network, self.options.cut, clock)


class FeatureDistances(DenoisingCallback):
    """Sums the L1 distances of each step's feature to those of the steps before it.

    Attributes:
        distances: ``[T, L]``, float64: of step j's feature to that of step j + l.
    """

    name = "feature-distances"

    def __init__(self, cached: CachedUNet, total: int, length: int) -> None:
        super().__init__(BaseOptions())
        self._cached = cached
        self.distances = torch.zeros(total, length, dtype=torch.float64)
        self._latest: deque[Tensor] = deque(maxlen=length)

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        if step.index == 0:
            self._latest.clear()
        feature = cast(Tensor, self._cached.feature)
        self._latest.append(feature)
        for distance, earlier in enumerate(reversed(self._latest)):
            apart = (feature - earlier).abs().double().sum()
            self.distances[step.index - distance, distance] += float(apart)
        return prediction


class CachedUNet(nn.Module):
    """A U-Net whose evaluations run whole or from the stored feature, as the clock says.

    Attributes:
        feature: what a cached evaluation recalls, ``[batch, C, h, w]``; None before any full one.
        correction: acts on what is recalled, before it is joined with its skip; None: it stays.

    Raises ConfigError if the network has fewer than ``cut`` decoder resnets.
    """

    def __init__(self, network: nn.Module, cut: int, clock: Clock) -> None:
        super().__init__()
        walk = UNetWalk(network)
        if cut > walk.depth:
            raise ConfigError(f"deepcache: cut {cut} wanted, this network has {walk.depth} at most")
        self.network, self._walk, self.cut, self._clock = network, walk, cut, clock
        self.feature: Tensor | None = None
        self.correction: nn.Module | None = None

    @property
    def consumer(self) -> nn.Module:
        """The resnet u_c, which takes the feature joined with its skip."""
        return self._walk.decoder[self._walk.depth - self.cut].resnet

    @property
    def channels(self) -> int:
        """Channels of the feature."""
        joined = cast(int, cast(Any, self.consumer).in_channels)
        if self.cut == 1:
            return joined - len(self._walk.unet.conv_in.weight)
        below = cast(Any, self._walk.encoder[self.cut - 2].layer)
        return joined - cast(int, below.out_channels)

    def forward(self, sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """Predict for ``sample [b, C, H, W]``; the clock says which path and which images."""
        hidden, context = self._walk.begin(sample, timestep, inputs)
        skips = [hidden]
        for unit in self._walk.encoder[: self.cut - 1]:
            skips.append(unit(skips[-1], context))
        feature = self._deep(skips, context) if self._clock.full else self._recall()
        first = self._walk.depth - self.cut
        hidden = self._walk.decode(feature, skips, context, first, self._walk.depth)
        return self._walk.finish(hidden)

    def _deep(self, shallow: list[Tensor], context: Context) -> Tensor:
        """The rest of the encoder, the middle, and the decoder down to the cut."""
        skips = list(shallow)
        for unit in self._walk.encoder[self.cut - 1 :]:
            skips.append(unit(skips[-1], context))
        hidden = self._walk.middle(skips[-1], context)
        feature = self._walk.decode(hidden, skips, context, 0, self._walk.depth - self.cut)
        self._remember(feature)
        return feature

    def _remember(self, feature: Tensor) -> None:
        clock = self._clock
        if clock.evaluation > 0 and not clock.store:
            return
        if clock.rows is None or self.feature is None:
            self.feature = feature
        else:
            self.feature = self.feature.index_copy(0, clock.rows, feature)

    def _recall(self) -> Tensor:
        if self.feature is None:
            raise RuntimeError("a cached evaluation before any full one: step 0 must be full")
        rows = self._clock.rows
        feature = self.feature if rows is None else self.feature[rows]
        return feature if self.correction is None else cast(Tensor, self.correction(feature))


def find_cache(network: nn.Module) -> CachedUNet | None:
    """The cached U-Net that ``network`` is or wraps, if any."""
    found = (module for module in network.modules() if isinstance(module, CachedUNet))
    return next(found, None)
