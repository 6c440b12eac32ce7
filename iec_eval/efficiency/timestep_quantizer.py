"""Timestep-wise quantization (Liu et al., CacheQuant, CVPR 2025; Zhong et al., ICLR 2026).

Weights have one grid per output channel; activations one per tensor and sampler step, because
their ranges drift along the trajectory. The arithmetic is simulated: grids are exact, the
products are floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from iec_eval.callbacks.base import DenoisingCallback
from iec_eval.clock import Clock
from iec_eval.denoising import Step
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.efficiency.quantized_layers import GridSearch, Switch
from iec_eval.efficiency.quantized_network import (
    Bits,
    QuantizedNetwork,
    check_quantizable,
    insert_quantizers,
)
from iec_eval.efficiency.quantizer import DEBUG_BITS, SAMPLES, Grid, Search
from iec_eval.efficiency.unet_walk import core_of, skip_splits
from iec_eval.errors import ConfigError
from iec_eval.options import BaseOptions, UsedBy

if TYPE_CHECKING:
    from iec_eval.calibration import Bench

EDGES = ("conv_in", "conv_out")
Granularity = Literal["tensor", "channel"]


class TimestepQuantizerOptions(BaseOptions):
    """Options of the timestep-wise quantizer."""

    used_by: ClassVar[UsedBy] = {
        "search": {
            "percentile": ("percentile",),
            "search_samples": ("mse", "percentile"),
            "official_ranges": ("mse", "max"),
        }
    }

    weight_bits: int = Field(8, description="of weights: 2 to 8, or 16 to debug")
    activation_bits: int = Field(8, description="of layer inputs and of q, k, v: 2 to 8, or 16")
    softmax_bits: int = Field(8, description="of softmax outputs: 2 to 8, or 16")
    edge_bits: int = Field(
        8, description="least bits of weights and inputs of the first and last layer"
    )
    edge_layers: list[str] | None = Field(
        None, description="names of these layers; null: conv_in and conv_out where they exist"
    )
    search: Search = Field(
        "mse",
        description="range of a grid: least rounding error, minimum to maximum, or percentiles",
    )
    percentile: float = Field(
        99.0, ge=50, le=100, description="for percentile: the upper one; the lower mirrors it"
    )
    search_samples: int | None = Field(
        SAMPLES,
        ge=1,
        description="for mse and percentile: values of an activation that score a grid; null: all",
    )
    images: int = Field(
        64, ge=1, description="calibration images that activation ranges are taken of, at most"
    )
    activations: Granularity = Field(
        "tensor", description="one activation grid per tensor, or per input channel of a layer"
    )
    split_skips: bool = Field(
        True, description="in the decoder, quantize hidden state and skip connection apart"
    )
    official_ranges: bool = Field(
        False,
        description="for mse and max: ranges of single-signed tensors as the released code takes "
        "them",
    )

    @field_validator("weight_bits", "activation_bits", "softmax_bits", "edge_bits")
    @classmethod
    def _legal(cls, value: int) -> int:
        if not (2 <= value <= 8 or value == DEBUG_BITS):
            raise ValueError("wanted 2 to 8 bits, or 16 to debug")
        return value


class TimestepQuantizer(EfficiencyMethod):
    """Quantize weights and activations, the latter with one grid per sampler step."""

    name = "timestep-quantizer"
    Options = TimestepQuantizerOptions
    slot = "quantizer"
    simulated = True
    options: TimestepQuantizerOptions

    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        """Find the grids: of weights from themselves, of activations along the trajectory.

        The network so far runs the trajectory. At every step it runs once more with activation
        quantizers on, weights not, so that each range is taken of an input that has the rounding
        errors of the layers before it.
        """
        core = core_of(bench.network)
        network = self._insert(core, bench.clock)
        try:
            bench.run([_Observe(network.switch)], images=self.options.images)
            search = self._search()
            found = {n: layer.find_weight_grids(search) for n, layer in network.layers.items()}
            return _as_tensors(found, ".weight") | _as_tensors(
                {name: quantizer.found() for name, quantizer in network.quantizers().items()}
            )
        finally:
            network.remove(core)

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        placed = self._insert(core_of(network), clock)
        if artifact:
            set_grids(placed, artifact)
        placed.switch.mode = "on"
        return network

    def _insert(self, core: nn.Module, clock: Clock) -> QuantizedNetwork:
        options = self.options
        check_quantizable(core)
        return insert_quantizers(
            core,
            clock,
            self._bits(core),
            self._search(),
            splits=skip_splits(core) if options.split_skips else {},
            per_channel=options.activations == "channel",
        )

    def _search(self) -> GridSearch:
        options = self.options
        return GridSearch(
            options.search, options.percentile, options.official_ranges, options.search_samples
        )

    def _bits(self, core: nn.Module) -> Bits:
        options, names = self.options, {name for name, _ in core.named_modules()}
        wanted = options.edge_layers
        edges = [n for n in EDGES if n in names] if wanted is None else wanted
        unknown = sorted(set(edges) - names)
        if unknown:
            raise ConfigError(
                f"timestep-quantizer: edge_layers names {', '.join(unknown)}, which "
                f"{type(core).__name__} does not have"
            )
        return Bits(
            options.weight_bits,
            options.activation_bits,
            options.softmax_bits,
            options.edge_bits,
            frozenset(edges),
        )


def set_grids(network: QuantizedNetwork, artifact: Mapping[str, Tensor]) -> None:
    """Take all grids from an artifact, and quantize the weights."""
    for name, layer in network.layers.items():
        layer.quantize_weights(_grid(artifact, f"{name}.weight"))
    for name, quantizer in network.quantizers().items():
        quantizer.set_grids(*_grid(artifact, name))


class _Observe(DenoisingCallback):
    """Evaluates every step once more with the quantizers observing."""

    name = "observe-ranges"

    def __init__(self, switch: Switch) -> None:
        super().__init__(BaseOptions())
        self._switch = switch

    def refine(self, step: Step, prediction: Tensor) -> Tensor:
        self._switch.mode = "observe"
        try:
            step.predict(step.sample, store=False)
        finally:
            self._switch.mode = "off"
        return prediction


def _as_tensors(grids: Mapping[str, Grid], suffix: str = "") -> dict[str, Tensor]:
    return {
        f"{name}{suffix}.{key}": value.float().cpu().clone()
        for name, grid in grids.items()
        for key, value in grid._asdict().items()
    }


def _grid(artifact: Mapping[str, Tensor], name: str) -> Grid:
    return Grid(*(artifact[f"{name}.{key}"] for key in Grid._fields))
