"""DeepCache (Ma et al., CVPR 2024): reuse the deep feature of the last full step.

Decoder resnets are numbered from the output, u_1 being the last. With cut c, a full step stores
the hidden state that enters u_c, before it is joined with its skip; a cached step runs only the
encoder part whose skips u_c..u_1 need, takes the stored state, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from pydantic import Field
from torch import Tensor, nn

from iec_eval.clock import Clock
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.efficiency.unet_walk import Context, UNetWalk
from iec_eval.errors import ConfigError
from iec_eval.options import BaseOptions


class DeepCacheOptions(BaseOptions):
    """Options of DeepCache."""

    interval: int = Field(ge=1, description="every N-th step is full, starting with step 0")
    cut: int = Field(
        1,
        ge=1,
        description="decoder resnets that every step recomputes, counted from the output; "
        "the released code uses 4 for the CIFAR-10 DDPM and 1 for latent diffusion",
    )


class DeepCache(EfficiencyMethod):
    """Skip the deep part of the U-Net on all but every N-th step."""

    name = "deepcache"
    Options = DeepCacheOptions
    slot = "cacher"
    options: DeepCacheOptions

    def full_steps(self, total: int, artifact: Artifact) -> Collection[int]:
        if self.options.interval > total:
            raise ConfigError(
                f"deepcache: interval {self.options.interval} is longer than the run of {total} "
                f"steps; give at most {total}"
            )
        return uniform_schedule(total, self.options.interval)

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        return CachedUNet(network, self.options.cut, clock)


def uniform_schedule(total: int, interval: int) -> range:
    """S = {0, N, 2N, ...} below T."""
    return range(0, total, interval)


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
