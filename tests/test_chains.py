"""Efficiency methods on top of each other: legal pairs and orders, CacheQuant, artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from helpers import ConvNet, build, ddim, packaged, run
from torch import Tensor

from iec_eval.calibration import Bench
from iec_eval.callbacks.iec import IEC
from iec_eval.clock import Clock
from iec_eval.efficiency.base import EfficiencyMethod
from iec_eval.efficiency.cachequant import CacheQuant
from iec_eval.efficiency.deepcache import DeepCache
from iec_eval.efficiency.error_correction import CacheCorrection, QuantizationCorrection
from iec_eval.efficiency.hooks import iec_eval_efficiency_methods
from iec_eval.efficiency.reconstruction import Reconstruction
from iec_eval.efficiency.timestep_quantizer import TimestepQuantizer
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.models.base import DiffusionModel
from iec_eval.noise import Noise
from iec_eval.testing import TinyModel, check_efficiency_method
from iec_eval.testing.tiny import TinyOptions

Options = dict[str, Any]
STAGES: dict[type[EfficiencyMethod], Options] = {
    DeepCache: {"interval": 2, "cut": 2, "schedule": "dps"},
    CacheCorrection: {},
    TimestepQuantizer: {"search": "max"},
    QuantizationCorrection: {},
    Reconstruction: {"iterations": 2, "items": 8, "batch_size": 4},
}
# what must stand before a stage
NEEDS: dict[type[EfficiencyMethod], set[type[EfficiencyMethod]]] = {
    CacheCorrection: {DeepCache},
    QuantizationCorrection: {DeepCache, TimestepQuantizer},
    Reconstruction: {TimestepQuantizer},
}
# what must not
SPOILS: dict[type[EfficiencyMethod], set[type[EfficiencyMethod]]] = {
    Reconstruction: {QuantizationCorrection},
}
Chain = tuple[type[EfficiencyMethod], ...]


def every_chain(length: int) -> list[Chain]:
    return list(permutations(STAGES, length))


def is_legal(chain: Chain) -> bool:
    return all(
        NEEDS.get(cls, set()) <= {*chain[:place]} and not SPOILS.get(cls, set()) & {*chain[:place]}
        for place, cls in enumerate(chain)
    )


def label(chain: Sequence[type[EfficiencyMethod]]) -> str:
    return " > ".join(cls.name for cls in chain)


def legal(*lengths: int) -> list[Any]:
    chains = [chain for length in lengths for chain in every_chain(length) if is_legal(chain)]
    return [pytest.param(chain, id=label(chain)) for chain in chains]


def precise() -> TinyModel:
    """In float64 a quantizer's roundings do not depend on the batch."""
    return TinyModel(TinyOptions(double=True))


def check_last(chain: Chain, **more: Any) -> None:
    *before, last = chain
    earlier = [build(cls, STAGES[cls]) for cls in before]
    check_efficiency_method(last, STAGES[last], before=earlier, model=precise(), **more)


def test_every_built_in_is_in_the_chains() -> None:
    assert {*STAGES, CacheQuant} == set(iec_eval_efficiency_methods())


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_a_chain_fits_together_or_is_refused_with_the_reason(length: int) -> None:
    model = TinyModel()
    for chain in every_chain(length):
        if is_legal(chain):
            skeleton(chain, model)
        else:
            with pytest.raises(Incompatible, match=r"put .* before "):
                skeleton(chain, model)


def skeleton(chain: Chain, model: TinyModel) -> None:
    network, clock = model.skeleton(), Clock(5)
    for cls in chain:
        network = build(cls, STAGES[cls]).apply(network, clock, {})


@pytest.mark.parametrize("chain", legal(1))
def test_alone(chain: Chain) -> None:
    check_last(chain)


@pytest.mark.slow
@pytest.mark.parametrize("chain", legal(2))
def test_legal_pairs_in_every_order(chain: Chain) -> None:
    # combined with toys, a stage that fits one network might be refused another: pairs only
    check_last(chain, skip=["composition"])


@pytest.mark.slow
@pytest.mark.parametrize("chain", legal(3))
def test_legal_triples_in_every_order(chain: Chain) -> None:
    check_last(chain, images=4, skip=["calibration", "composition"])


@pytest.mark.slow
@pytest.mark.parametrize("chain", legal(5))
def test_all_stages_in_every_legal_order(chain: Chain) -> None:
    check_last(chain, images=2, skip=["artifact", "calibration", "composition"])


# --- CacheQuant -------------------------------------------------------------------------------

CACHEQUANT = {"interval": 2, "cut": 2, "quantizer": {"search": "max"}}
W4 = {"weight_bits": 4, "search": "max"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {**CACHEQUANT, "schedule": "dps"},
        {**CACHEQUANT, "quantizer": W4, "reconstruction": STAGES[Reconstruction]},
    ],
    ids=["W8A8", "W4A8"],
)
def test_cachequant_keeps_the_contract(options: Options) -> None:
    # DeepCache inside it takes the only place of a cacher, the quantizer that of one
    check_efficiency_method(CacheQuant, options, model=precise())


def names(options: Options) -> list[str]:
    return [part.name for part in build(CacheQuant, options).parts()]


def test_cachequant_is_its_stages() -> None:
    cached = ["deepcache", "cache-correction", "timestep-quantizer"]
    assert names(CACHEQUANT) == [*cached, "quantization-correction"]
    assert names({**CACHEQUANT, "quantizer": W4}) == [*cached, "reconstruction"]
    assert names({**CACHEQUANT, "reconstruct": True}) == [*cached, "reconstruction"]
    as_w8 = {**CACHEQUANT, "quantizer": W4, "reconstruct": False}
    assert names(as_w8) == [*cached, "quantization-correction"]


def test_cachequants_stages_take_its_options() -> None:
    given = {
        "interval": 4,
        "cut": 3,
        "schedule": "power",
        "power": 1.25,
        "quantizer": {"weight_bits": 5},
        "correction": {"layers": ["conv1"]},
        "reconstruction": {"preset": "church"},
    }
    parts = build(CacheQuant, {**given, "reconstruct": True}).parts()
    cache = build(DeepCache, {k: given[k] for k in ("interval", "cut", "schedule", "power")})
    assert parts[0].options == cache.options
    assert parts[2].options == build(TimestepQuantizer, {"weight_bits": 5}).options
    assert parts[3].options == build(Reconstruction, {"preset": "church"}).options
    corrected = build(CacheQuant, {**given, "reconstruct": False}).parts()
    assert corrected[3].options == build(QuantizationCorrection, {"layers": ["conv1"]}).options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": 2}, "'interval' is missing"),
        ({"interval": 0}, "interval: .* greater than or equal to 1"),
        ({"interval": 2, "power": 2.0}, "power has no effect on the schedule uniform"),
        ({"interval": 2, "quantizer": {"weight_bits": 1}}, "quantizer.weight_bits: wanted 2 to 8"),
        ({"interval": 2, "quantiser": {}}, "unknown key 'quantiser'; did you mean 'quantizer'"),
        (
            {"interval": 2, "reconstruction": {"iteration": 5}},
            "unknown key 'reconstruction.iteration'; did you mean 'iterations'",
        ),
        (
            {"interval": 2, "reconstruction": {"iterations": 5}},
            "reconstruction has no effect, for weights of 8 bits are not reconstructed; "
            "leave it out, or say reconstruct: true",
        ),
        (
            {"interval": 2, "quantizer": W4, "correction": {"layers": ["conv1"]}},
            "correction has no effect, for weights of 4 bits are reconstructed; "
            "leave it out, or say reconstruct: false",
        ),
    ],
)
def test_wrong_options_of_cachequant(options: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(CacheQuant, options)


def applied(
    methods: Sequence[EfficiencyMethod], model: DiffusionModel, steps: int, images: int = 16
) -> tuple[Any, Clock]:
    """The model's network with every part calibrated and applied in turn."""
    network, clock = model.load(), Clock(steps)
    for part in (part for method in methods for part in method.parts()):
        bench = Bench(
            network, clock, model, ddim(steps=steps, spacing="quad"), seed=5, images=images
        )
        artifact = part.calibrate(bench)
        clock.full_steps &= frozenset(part.full_steps(steps, artifact))
        network = part.apply(network, clock, artifact)
    return network, clock


def latents(
    network: Any, clock: Clock, model: DiffusionModel, callbacks: Sequence[Any] = ()
) -> Tensor:
    noise = Noise(77, range(16), model.shape)
    condition = model.condition(noise.images)
    sampler = ddim(steps=clock.total, spacing="quad")
    return run(network, sampler, noise, callbacks, clock=clock, condition=condition)


@pytest.mark.slow
def test_corrections_bring_the_packaged_model_nearer_to_full_precision() -> None:
    """On images of other noise than they were fitted on."""
    model, steps = packaged(), 10
    exact = latents(model.load(), Clock(steps), model)
    cache, quantizer = {"interval": 5, "cut": 3}, {"search": "max"}
    chains: dict[str, list[EfficiencyMethod]] = {
        "cached": [build(DeepCache, cache)],
        "cached, corrected": [build(DeepCache, cache), build(CacheCorrection)],
        "stacked": [build(DeepCache, cache), build(TimestepQuantizer, quantizer)],
        "cachequant": [build(CacheQuant, {**cache, "quantizer": quantizer})],
    }
    away = {
        name: float((latents(*applied(chain, model, steps, 64), model) - exact).square().mean())
        for name, chain in chains.items()
    }
    assert away["cached, corrected"] < 0.7 * away["cached"]
    assert away["cachequant"] < 0.95 * away["stacked"]


def test_cachequant_equals_its_stages_written_out() -> None:
    model = precise()
    composed = applied([build(CacheQuant, CACHEQUANT)], model, 6, images=4)
    written = applied(build(CacheQuant, CACHEQUANT).parts(), model, 6, images=4)
    iec = [build(IEC, {"preset": "paper"})]
    assert torch.equal(latents(*composed, model, iec), latents(*written, model, iec))


def test_networks_without_skip_connections_are_refused() -> None:
    for part in build(CacheQuant, CACHEQUANT).parts()[:2]:
        with pytest.raises(
            Incompatible, match=r"needs diffusers' UNet2DModel|put deepcache before"
        ):
            part.apply(ConvNet(), Clock(4), {})
