"""Reconstruction of a quantized network, block by block (methods of AdaRound and BRECQ).

Each weight is rounded up or down (:mod:`.soft_rounding`) so that a block's output, not the weight,
is met best, learned together with the scales and zero points of the block's activations (Li et
al., BRECQ, ICLR 2021). The block's inputs are those of the quantized network with the earlier
blocks done, its targets the outputs of the full-precision one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from diffusers import Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from pydantic import Field, model_validator
from torch import Tensor, nn

from iec_eval.clock import Clock
from iec_eval.efficiency.base import Artifact, EfficiencyMethod
from iec_eval.efficiency.deepcache import find_cache
from iec_eval.efficiency.quantized_layers import (
    ActivationQuantizer,
    QuantizedLayer,
)
from iec_eval.efficiency.quantized_network import QuantizedNetwork, find_quantized
from iec_eval.efficiency.quantizer import Grid
from iec_eval.efficiency.reconstruction_data import BlockData, Items, gather_items, squared_error
from iec_eval.efficiency.soft_rounding import SoftRounding
from iec_eval.efficiency.unet_walk import core_of
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.options import NOT_DECISIVE, BaseOptions, UsedBy

if TYPE_CHECKING:
    from iec_eval.calibration import Bench, Draft

BLOCKS: Any = (ResnetBlock2D, Attention, Transformer2DModel)
WARM_UP = 0.2  # share of the iterations before the regulariser acts
SHARPNESS = (20.0, 2.0)  # its exponent, from and to

# learning rates: of rounding, activation scales, zero points, weights behind the cache
RATES: Mapping[str, tuple[float, float, float, float]] = {
    "cifar10": (1e-4, 1e-4, 1e-4, 1e-6),
    "cifar10-cachequant": (5e-1, 1e-4, 1e-1, 1e-6),
    "church": (5e-3, 1e-6, 1e-1, 1e-3),
    "bedroom": (5e-3, 1e-6, 1e-1, 1e-3),
    "bedroom-cachequant": (5e-7, 1e-7, 0.0, 1e-4),
    "imagenet": (5e-3, 1e-4, 1e-1, 1e-2),
    "stable-diffusion": (1e-3, 1e-4, 0.0, 1e-3),
}


class ReconstructionOptions(BaseOptions):
    """Options of reconstruction; ``preset`` fills in learning rates that are not given."""

    used_by: ClassVar[UsedBy] = {"regularizer": {"regularizer_weight": ("annealed",)}}

    preset: Annotated[
        Literal[
            "cifar10",
            "cifar10-cachequant",
            "church",
            "bedroom",
            "bedroom-cachequant",
            "imagenet",
            "stable-diffusion",
        ]
        | None,
        NOT_DECISIVE,
    ] = Field(None, description="learning rates of the released code for this data set")
    granularity: Literal["block", "layer"] = Field(
        "block", description="what is met at once: outputs of resnets and attentions, or of layers"
    )
    iterations: int = Field(3000, ge=1, description="optimiser steps of each block")
    batch_size: int = Field(32, ge=1, description="inputs of one optimiser step")
    items: int = Field(
        1024, ge=1, description="network inputs to learn from, drawn over all steps and images"
    )
    images: int = Field(64, ge=1, description="calibration images to draw them from, at most")
    rounding_rate: float = Field(1e-2, ge=0, description="learning rate of the rounding")
    scale_rate: float = Field(
        1e-4, ge=0, description="learning rate of activation scales, times their mean"
    )
    zero_rate: float = Field(0.0, ge=0, description="learning rate of zero points")
    weight_rate: float = Field(
        0.0, ge=0, description="learning rate of weights and biases behind the cache"
    )
    regularizer: Literal["annealed", "official"] = Field(
        "annealed", description="push the rounding to 0 or 1; official: do not, as released"
    )
    regularizer_weight: float = Field(0.01, gt=0, description="of the annealed regulariser")
    quantized_inputs: float = Field(
        1.0, ge=0, le=1, description="share of inputs with the errors of the blocks before"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        preset = given.get("preset") if isinstance(given, dict) else None
        if not isinstance(preset, str) or preset not in RATES:
            return given
        names = ("rounding_rate", "scale_rate", "zero_rate", "weight_rate")
        return {**dict(zip(names, RATES[preset], strict=True)), **given}


class Reconstruction(EfficiencyMethod):
    """Learn the rounding of a quantized network's weights, block by block."""

    name = "reconstruction"
    Options = ReconstructionOptions
    simulated = True
    options: ReconstructionOptions

    def calibrate(self, bench: Bench) -> dict[str, Tensor]:
        """Learn the blocks in the order they run; finished ones survive an interruption."""
        with torch.inference_mode(False), torch.enable_grad():
            return _Workshop.open(bench, self.options).work()

    def apply(self, network: nn.Module, clock: Clock, artifact: Artifact) -> nn.Module:
        placed = _quantized(network)
        if artifact:
            take(placed, artifact)
        return network


def take(network: QuantizedNetwork, artifact: Artifact) -> None:
    """Set weights and activation grids to what was learned, as far as ``artifact`` has them."""
    for name, layer in network.layers.items():
        if f"{name}.codes" in artifact:
            grid = Grid(artifact[f"{name}.weight_scale"], artifact[f"{name}.weight_zero_point"])
            bias = artifact.get(f"{name}.bias")
            layer.set_codes(artifact[f"{name}.codes"], grid, bias)
    for name, quantizer in network.quantizers().items():
        if f"{name}.scale" in artifact:
            quantizer.set_grids(artifact[f"{name}.scale"], artifact[f"{name}.zero_point"])


def _quantized(network: nn.Module) -> QuantizedNetwork:
    placed = find_quantized(core_of(network))
    if not placed.layers:
        raise Incompatible("reconstruction needs a quantized network: put a quantizer before it")
    corrected = [name for name, layer in placed.layers.items() if layer.correction is not None]
    if corrected:
        raise Incompatible(
            f"reconstruction changes what the correction of {corrected[0]} was fitted to; put it "
            "before quantization-correction"
        )
    return placed


@dataclass(frozen=True)
class _Block:
    """One unit of reconstruction, in both networks."""

    name: str
    student: nn.Module
    teacher: nn.Module
    behind_cache: bool


PATIENCE = 20  # seconds of learning for each second of saving


class _Saving:
    """Saves finished blocks, all of them each time, as often as it costs little.

    Where blocks are many and quick, writing all of them after each would take longer than
    learning them. An exception saves what is finished.
    """

    def __init__(self, draft: Draft, done: Mapping[str, Tensor]) -> None:
        self._draft, self._done = draft, done
        self._cost, self._saved_at = 0.0, -math.inf  # seconds
        self._works = True

    def __enter__(self) -> _Saving:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._done and self._works:
            self._save()

    def block_is_done(self) -> None:
        """Save, if the last time it took little of the time since."""
        if time.perf_counter() - self._saved_at >= PATIENCE * self._cost:
            self._save()

    def _save(self) -> None:
        began, self._works = time.perf_counter(), False
        self._draft.save(self._done)
        self._saved_at, self._works = time.perf_counter(), True
        self._cost = self._saved_at - began


@dataclass(frozen=True)
class _Workshop:
    """Everything reconstruction works with."""

    bench: Bench
    options: ReconstructionOptions
    teacher: nn.Module
    items: Items

    @classmethod
    def open(cls, bench: Bench, options: ReconstructionOptions) -> _Workshop:
        teacher = bench.model.load().to(bench.device).eval().requires_grad_(False)
        cache = find_cache(bench.network)
        some = replace(bench, images=min(bench.images, options.images))
        items = gather_items(some, teacher, cache.cut if cache else None, options.items)
        if items.first_cached == 0:
            raise ConfigError(
                f"reconstruction: none of the {len(items.steps)} items is of a full step, which "
                "the deep layers learn from; give more items"
            )
        return cls(bench, options, teacher, items)

    def work(self) -> dict[str, Tensor]:
        """All blocks; what is done is saved as it goes."""
        placed = _quantized(self.bench.network)
        with _left_as_it_was(self.bench, placed):
            done = self.bench.draft.load()
            take(placed, done)
            blocks = enumerate(self._blocks(placed))
            due = [(n, block) for n, block in blocks if f"{block.name}.losses" not in done]
            self.bench.progress.start(len(due) * self.options.iterations)
            with _Saving(self.bench.draft, done) as saving:
                for number, block in due:
                    learned = self._learn(block, placed, number)
                    take(placed, learned)
                    done.update(learned)
                    saving.block_is_done()
        return done

    def _blocks(self, placed: QuantizedNetwork) -> list[_Block]:
        """The units in the order in which the full network runs them."""
        student, teacher = core_of(self.bench.network), core_of(self.teacher)
        wanted = BLOCKS if self.options.granularity == "block" else BLOCKS[:0]
        names = _outermost(student, wanted)
        order = self.items.order_of_calls(self.teacher, _counterparts(teacher, names))
        shallow = self.items.called_when_cached(
            self.bench, {name: student.get_submodule(name) for name in names}
        )
        return [
            _Block(
                name,
                student.get_submodule(name),
                teacher.get_submodule(name),
                name in shallow and name.startswith(("up_blocks", "conv_out")),
            )
            for name in order
        ]

    def _learn(self, block: _Block, placed: QuantizedNetwork, number: int) -> dict[str, Tensor]:
        learner = _Learner.of(block, placed, self.options)
        data = self.items.of_block(
            self.bench, self.teacher, block.student, block.teacher, self.options.quantized_inputs
        )
        seed = (self.bench.seed * 1_000_003 + number) % 2**63
        generator = torch.Generator().manual_seed(seed)
        before = data.loss(self.bench, block.student)
        learner.begin()
        try:
            self._descend(learner, data, generator)
            soft = data.loss(self.bench, block.student)
        finally:
            learner.end()
        learned = learner.hardened()
        take(placed, learned)
        after = data.loss(self.bench, block.student)
        if not after <= before:  # hardening lost more than learning won, or learning diverged
            learned = learner.undo()
        losses = torch.tensor([before, soft, after], dtype=torch.float64)
        return {**learned, f"{block.name}.losses": losses}

    def _descend(self, learner: _Learner, data: BlockData, generator: torch.Generator) -> None:
        """Adam on the block's error."""
        options, clock = self.options, self.bench.clock
        optimizer = torch.optim.Adam(learner.parameter_groups())
        schedule = _fall(optimizer, options)
        for iteration in range(options.iterations):
            rows = torch.randint(len(data), (options.batch_size,), generator=generator)
            batch = data.batch(rows, self.bench.device, generator)
            clock.steps = batch.steps
            loss = squared_error(batch.run(learner.block.student), batch.target)
            share = iteration / options.iterations
            if options.regularizer == "annealed" and share >= WARM_UP:
                loss = loss + options.regularizer_weight * learner.undecided(_sharpness(share))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            self.bench.progress.advance(1)


@dataclass(frozen=True)
class _Learner:
    """What is learned of one block."""

    block: _Block
    layers: dict[str, QuantizedLayer]
    quantizers: dict[str, ActivationQuantizer]
    soft: dict[str, SoftRounding]
    options: ReconstructionOptions
    original: dict[str, Tensor]

    @classmethod
    def of(
        cls, block: _Block, placed: QuantizedNetwork, options: ReconstructionOptions
    ) -> _Learner:
        layers = {n: x for n, x in placed.layers.items() if _within(n, block.name)}
        quantizers = {n: q for n, q in placed.quantizers().items() if _within(n, block.name)}
        trains = block.behind_cache and options.weight_rate > 0
        soft = {}
        for name, layer in layers.items():
            path = name.removeprefix(block.name).removeprefix(".")
            source = cast(Any, block.teacher.get_submodule(path) if path else block.teacher)
            soft[name] = SoftRounding(layer, source.weight, source.bias, train_weights=trains)
        original = _part_state(layers, quantizers) | (_biases(layers) if trains else {})
        return cls(block, layers, quantizers, soft, options, original)

    def begin(self) -> None:
        """Compute with what is being learned."""
        for name, layer in self.layers.items():
            layer.learned = self.soft[name]
        for quantizer in self.quantizers.values():
            # copies, to be changed in place: the tables may be those of an artifact
            quantizer.set_grids(quantizer.scale.clone(), quantizer.zero_point.clone())
            quantizer.scale.requires_grad_(self.options.scale_rate > 0)
            quantizer.zero_point.requires_grad_(self.options.zero_rate > 0)

    def end(self) -> None:
        """Compute with fixed numbers again."""
        for layer in self.layers.values():
            layer.learned = None
        for quantizer in self.quantizers.values():
            quantizer.set_grids(
                quantizer.scale.detach().abs().clamp(min=1e-12), quantizer.zero_point.detach()
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For the optimiser; scales each at a rate in proportion to their size."""
        options, soft = self.options, list(self.soft.values())
        groups = [{"params": [s.rounding for s in soft], "lr": options.rounding_rate}]
        if options.zero_rate > 0:
            zeros = [s.zero_point for s in soft] + [q.zero_point for q in self.quantizers.values()]
            groups.append({"params": zeros, "lr": options.zero_rate})
        if options.scale_rate > 0:
            groups += [
                {"params": [q.scale], "lr": options.scale_rate * float(q.scale.detach().mean())}
                for q in self.quantizers.values()
            ]
        weights = [p for s in soft for p in (s.weight, s.bias) if p is not None and p.requires_grad]
        return [*groups, *([{"params": weights, "lr": options.weight_rate}] if weights else [])]

    def undecided(self, sharpness: float) -> Tensor:
        """The regulariser, summed over the block's weights."""
        return torch.stack([soft.undecided(sharpness) for soft in self.soft.values()]).sum()

    def hardened(self) -> dict[str, Tensor]:
        """What was learned, as an artifact's tensors."""
        made: dict[str, Tensor] = {}
        for name, soft in self.soft.items():
            codes, grid = soft.harden()
            made |= _weight_state(name, codes, grid, self.layers[name].weight_bits)
            if soft.bias is not None and soft.bias.requires_grad:
                made[f"{name}.bias"] = soft.bias.detach().cpu().clone()
        return made | _grid_state(self.quantizers)

    def undo(self) -> dict[str, Tensor]:
        """What was there before, as an artifact's tensors."""
        return self.original


def _fall(
    optimizer: torch.optim.Optimizer, options: ReconstructionOptions
) -> torch.optim.lr_scheduler.LRScheduler:
    """Rates fall to zero along a cosine, but that of the rounding, the first, not if annealed.

    The regulariser decides most roundings in the last iterations: with a rate near zero they would
    stay between up and down, and hardening would undo much of what was learned.
    """

    def cosine(iteration: int) -> float:
        return (1 + math.cos(math.pi * iteration / options.iterations)) / 2

    def constant(iteration: int) -> float:
        return 1.0

    rounding = constant if options.regularizer == "annealed" else cosine
    others = len(optimizer.param_groups) - 1
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [rounding, *[cosine] * others])


def _sharpness(share: float) -> float:
    """The regulariser's exponent: falls linearly after the warm-up."""
    start, end = SHARPNESS
    return start + (end - start) * (share - WARM_UP) / (1 - WARM_UP)


def _within(name: str, outer: str) -> bool:
    """Whether a module's name is ``outer`` or inside it."""
    return f"{name}.".startswith(f"{outer}.")


def _outermost(core: nn.Module, kinds: Sequence[type[nn.Module]]) -> list[str]:
    """Names of the modules of ``kinds`` that hold quantized layers, and of layers outside them."""
    names: list[str] = []
    for name, module in core.named_modules():
        if any(_within(name, outer) for outer in names):
            continue
        if isinstance(module, (QuantizedLayer, *kinds)) and name:
            names.append(name)
    return names


def _counterparts(teacher: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of these names in the original network."""
    modules = dict(teacher.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise Incompatible(
            f"reconstruction compares layers by name, and the original network has no {missing[0]}"
        )
    return {name: modules[name] for name in names}


def _weight_state(name: str, codes: Tensor, grid: Grid, bits: int) -> dict[str, Tensor]:
    kind = torch.uint8 if bits <= 8 else torch.int32
    return {
        f"{name}.codes": codes.to(kind).cpu(),
        f"{name}.weight_scale": grid.scale.detach().cpu().clone(),
        f"{name}.weight_zero_point": grid.zero_point.detach().cpu().clone(),
    }


def _grid_state(quantizers: Mapping[str, ActivationQuantizer]) -> dict[str, Tensor]:
    made = {}
    for name, quantizer in quantizers.items():
        made[f"{name}.scale"] = quantizer.scale.detach().cpu().clone()
        made[f"{name}.zero_point"] = quantizer.zero_point.detach().cpu().clone()
    return made


def _part_state(
    layers: Mapping[str, QuantizedLayer], quantizers: Mapping[str, ActivationQuantizer]
) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert layer.grid is not None
        made |= _weight_state(name, layer.codes(), layer.grid, layer.weight_bits)
    return made | _grid_state(quantizers)


def _biases(layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    biases = {name: cast(Tensor | None, layer.layer.bias) for name, layer in layers.items()}
    return {f"{n}.bias": b.detach().cpu().clone() for n, b in biases.items() if b is not None}


@contextmanager
def _left_as_it_was(bench: Bench, placed: QuantizedNetwork) -> Iterator[None]:
    """Within the block network and clock may be changed; after it they are as before."""
    clock, cache = bench.clock, find_cache(bench.network)
    position, feature = dict(vars(clock)), cache.feature if cache else None
    weights = [(x, x.grid, x.layer.weight, x.layer.bias) for x in placed.layers.values()]
    grids = [(q, q.scale, q.zero_point) for q in placed.quantizers().values()]
    try:
        yield
    finally:
        vars(clock).update(position)
        if cache is not None:
            cache.feature = feature
        for layer, grid, weight, bias in weights:
            layer.grid, layer.layer.weight, layer.layer.bias = grid, weight, bias
        for quantizer, *tables in grids:
            quantizer.set_grids(*tables)
