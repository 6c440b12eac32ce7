"""Error correction by least squares (Liu et al., CacheQuant, CVPR 2025).

What caching and quantization do to a feature is, to first order, a change of scale and mean of
each channel that depends on the step alone. So it is undone by an affine map for each step and
channel, fitted on calibration images: of the recalled feature (:class:`CacheCorrection`), and of
what the quantized layers make of it (:class:`QuantizationCorrection`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import conv2d

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.efficiency.deepcache import CachedUNet, find_cache
from iec_eval.efficiency.quantized_layers import QuantizedLayer
from iec_eval.efficiency.unet_walk import find_unet
from iec_eval.errors import Incompatible
from iec_eval.options import BaseOptions

if TYPE_CHECKING:
    from iec_eval.calibration import Bench

ROWS = 8  # sums are taken of so many images at once: float64 copies of more would take much memory
ROUNDING = 1e-12  # a variance below this share of the mean square is rounding of float32

Layer = Literal["conv1", "conv_shortcut"]
BOTH: list[Layer] = ["conv1", "conv_shortcut"]


# --- affine maps for each step and channel ----------------------------------------------------


class Line(NamedTuple):
    """Slope and intercept of y = a x + b, ``[total, C]`` each."""

    slope: Tensor
    intercept: Tensor


class StreamedFit:
    """Least squares y ~ a x + b for each step and channel, over any number of batches.

    Sums of n, x, y, x² and xy are all it keeps, in float64.
    """

    def __init__(self, total: int, channels: int, device: torch.device | None = None) -> None:
        self._sums = torch.zeros(5, total, channels, dtype=torch.float64, device=device)

    def add(self, step: int, x: Tensor, y: Tensor) -> None:
        """Take in ``x`` and ``y [B, C, ...]`` of a step: a pair from every sample and pixel."""
        for some_x, some_y in zip(x.split(ROWS), y.split(ROWS), strict=True):
            self._sums[:, step] += _sums(_by_channel(some_x), _by_channel(some_y))

    def solve(self) -> Line:
        """The best lines, in float64.

        The slope is 1 where x does not vary, and the line the identity where no pair was seen.
        """
        n, x, y, xx, xy = self._sums.clone()
        n = n.clamp(min=1)
        variance, covariance = xx / n - (x / n) ** 2, xy / n - x / n * y / n
        varies = variance > ROUNDING * xx / n
        slope = torch.where(varies, covariance / variance.where(varies, 1), 1.0)
        return Line(slope, y / n - slope * x / n)


def _by_channel(x: Tensor) -> Tensor:
    return x.double().transpose(0, 1).flatten(1)


def _sums(x: Tensor, y: Tensor) -> Tensor:
    """n and the sums of x, y, x² and xy over the second dimension, ``[5, C]``."""
    count = torch.full_like(x[:, 0], x.shape[1])
    return torch.stack([count, x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1)])


class StepAffine(nn.Module):
    """x -> a_i x + b_i for each channel, with the entries of the rows' sampler steps i."""

    slope: Tensor
    intercept: Tensor

    def __init__(self, clock: Clock, line: Line) -> None:
        super().__init__()
        self._clock = clock
        self.register_buffer("slope", line.slope)
        self.register_buffer("intercept", line.intercept)

    def forward(self, x: Tensor) -> Tensor:
        """``x [b, C, ...]`` corrected; the same shape."""
        return self._clock.at(self.slope, x) * x + self._clock.at(self.intercept, x)


def _step_affine(
    clock: Clock, artifact: Artifact, names: tuple[str, str], channels: int, like: Tensor
) -> StepAffine:
    """From an artifact's tables, as ``like`` is; the identity if the artifact is empty."""
    if not artifact:
        ones = like.new_ones(clock.total, channels)
        return StepAffine(clock, Line(ones, torch.zeros_like(ones)))
    return StepAffine(clock, Line(*(artifact[name].to(like) for name in names)))


def _as_tensors(line: Line, names: tuple[str, str]) -> dict[str, Tensor]:
    return {name: table.float().cpu() for name, table in zip(names, line, strict=True)}


# --- of the recalled feature ------------------------------------------------------------------


class CacheCorrection(EfficiencyMethod):
    """Correct the feature that a cached step recalls: h = a_i F + b_i for each channel.

    At a cached step i after the full step j, a_i and b_i are the least squares of F_i on F_j over
    samples and pixels, along trajectories whose every step is full; at full steps they are 1, 0.
    """

    name = "cache-correction"
    TABLES = ("a", "b")

    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        """Fit in one pass that keeps, of the features, only the last full step's of a batch."""
        cached, clock = _cached_unet(bench.network, self.name), bench.clock
        fit = StreamedFit(clock.total, cached.channels, bench.device)
        observer = _FitFeatures(cached, clock.full_steps, fit)
        with bench.every_step_full():
            bench.run([observer])
        return _as_tensors(fit.solve(), self.TABLES)

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        cached = _cached_unet(network, self.name)
        if cached.correction is not None:
            raise Incompatible(f"{self.name}: the recalled feature is corrected already")
        like = next(cached.parameters())
        cached.correction = _step_affine(clock, artifact, self.TABLES, cached.channels, like)
        return network


class _FitFeatures(DenoisingCallback):
    """Fits the feature of each step on that of the group's first step."""

    name = "fit-features"

    def __init__(self, cached: CachedUNet, starts: Collection[int], fit: StreamedFit) -> None:
        super().__init__(BaseOptions())
        self._cached, self._starts, self._fit = cached, starts, fit
        self._start: Tensor | None = None

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        feature = cast(Tensor, self._cached.feature)
        if step.index in self._starts:
            self._start = feature
        else:
            self._fit.add(step.index, cast(Tensor, self._start), feature)
        return prediction


def _cached_unet(network: nn.Module, name: str) -> CachedUNet:
    found = find_cache(network)
    if found is None:
        raise Incompatible(
            f"{name} corrects what a cached step recalls, and this network caches nothing; put "
            "deepcache before it"
        )
    return found


# --- of the layers that take it ---------------------------------------------------------------


class QuantizationCorrectionOptions(BaseOptions):
    """Options of the correction of quantized layers."""

    layers: list[Layer] = Field(
        BOTH,
        min_length=1,
        description="which layers of the resnet that takes the cached feature; the released code "
        "corrects only conv_shortcut on CIFAR-10",
    )

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: list[Layer]) -> list[Layer]:
        for position, name in enumerate(layers):
            if name in layers[:position]:
                raise ValueError(f"{name} is listed twice")
        return layers


class QuantizationCorrection(EfficiencyMethod):
    """Correct what the quantized layers that take the cached feature h make of it.

    These are the first convolution and the shortcut of the first resnet after the cut, over
    [h, skip]. For each step i and output channel, alpha_i and beta_i are the least squares of
    W_h * x_h on Q(W_h) * Q_i(x_h), with the layer's own inputs x_h in the quantized, cached
    network along its own trajectory. Then the layer computes

        alpha_i (Q(W_h) * Q_i(x_h)) + beta_i + Q(W_s) * Q_i(x_s) + bias.

    The released code adds the bias to both sides of the fit, which makes its beta wrong by
    (1 - alpha) bias; here it is in neither.
    """

    name = "quantization-correction"
    Options = QuantizationCorrectionOptions
    options: QuantizationCorrectionOptions

    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        layers, width = self._layers(bench.network)
        weights = _exact_weights(bench, layers)
        fits = {
            name: LayerFit(layer, weights[name], width, bench.clock)
            for name, layer in layers.items()
        }
        with _watching(layers, fits):
            bench.run([])
        tensors: dict[str, Tensor] = {}
        for name, fit in fits.items():
            tensors |= _as_tensors(fit.fit.solve(), _tables(name))
        return tensors

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        layers, width = self._layers(network)
        for name, layer in layers.items():
            if layer.correction is not None:
                raise Incompatible(f"{self.name}: {name} is corrected already")
            weight = layer.weight
            affine = _step_affine(clock, artifact, _tables(name), len(weight), weight)
            layer.correction = HiddenCorrection(affine, width)
        return network

    def _layers(self, network: nn.Module) -> tuple[dict[str, QuantizedLayer], int]:
        """The layers by their names in the resnet, and how many channels of their input are h."""
        cached = _cached_unet(network, self.name)
        resnet = cached.consumer
        layers = {name: getattr(resnet, name, None) for name in self.options.layers}
        for name, layer in layers.items():
            self._check(name, layer)
        return cast(dict[str, QuantizedLayer], layers), cached.channels

    def _check(self, name: str, layer: nn.Module | None) -> None:
        if layer is None:
            raise Incompatible(
                f"{self.name}: the resnet that takes the cached feature has no {name}; leave it "
                "out of layers"
            )
        if not isinstance(layer, QuantizedLayer):
            raise Incompatible(
                f"{self.name} corrects quantized layers, and {name} of the resnet that takes the "
                "cached feature is not; put timestep-quantizer before it"
            )


class LayerFit:
    """Fits, along a trajectory, what a layer should make of h on what it makes of it.

    A forward pre-hook of the quantized layer.

    Args:
        layer: over [h, skip].
        weight: the layer's in full precision, ``[O, I, k, k]``.
        width: channels of h.
        clock: says which step it is.
    """

    def __init__(self, layer: QuantizedLayer, weight: Tensor, width: int, clock: Clock) -> None:
        self._exact = weight[:, :width].to(layer.weight)
        self._clock, self._width = clock, width
        self.fit = StreamedFit(clock.total, len(weight), self._exact.device)

    def __call__(self, layer: QuantizedLayer, inputs: tuple[Tensor, ...]) -> None:
        width, (x,) = self._width, inputs
        exact = _convolve(layer.layer, x[:, :width], self._exact)
        rounded = layer.quantize_input(x)[:, :width]
        made = _convolve(layer.layer, rounded, layer.weight[:, :width])
        self.fit.add(self._clock.step, made, exact)


class HiddenCorrection(nn.Module):
    """What a convolution over [h, skip] computes when the part that h gives is corrected."""

    def __init__(self, affine: StepAffine, width: int) -> None:
        super().__init__()
        self.affine, self._width = affine, width

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``layer``'s output for its quantized input ``x``, the part of h corrected."""
        width, convolution = self._width, cast(nn.Conv2d, layer)
        weight = convolution.weight
        hidden = _convolve(layer, x[:, :width], weight[:, :width])
        rest = _convolve(layer, x[:, width:], weight[:, width:], convolution.bias)
        return cast(Tensor, self.affine(hidden)) + rest


def _convolve(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight * x`` with the stride and padding of ``layer``."""
    like = cast(nn.Conv2d, layer)
    return conv2d(x, weight, bias, like.stride, like.padding, like.dilation)


@contextmanager
def _watching(layers: Mapping[str, QuantizedLayer], fits: Mapping[str, LayerFit]) -> Iterator[None]:
    """Show each layer's inputs to its fit within the block."""
    handles = [layer.register_forward_pre_hook(fits[name]) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _exact_weights(bench: Bench, layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """The layers' weights in the original network, where they have the same places."""
    here = cast(nn.Module, find_unet(bench.network))
    original = cast(nn.Module, find_unet(bench.model.load()))
    places = {module: place for place, module in here.named_modules()}
    return {
        name: cast(Tensor, original.get_submodule(places[layer]).weight)
        for name, layer in layers.items()
    }


def _tables(name: str) -> tuple[str, str]:
    return f"{name}.alpha", f"{name}.beta"
