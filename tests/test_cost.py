"""What an evaluation costs: as counted, by hand, and in measured time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from click.testing import Result
from conftest import installed_plugin
from diffusers import UNet2DModel
from helpers import SCHEDULE, build, ddim, packaged, plan_with, run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iec_eval.calibration import Bench
from iec_eval.callbacks.iec import IEC
from iec_eval.clock import Clock, Evaluations
from iec_eval.cost import EvaluationCost, evaluation_cost, expected_evaluations
from iec_eval.efficiency.deepcache import CachedUNet
from iec_eval.efficiency.timestep_quantizer import TimestepQuantizer
from iec_eval.noise import Noise
from iec_eval.plugins import load_registry
from iec_eval.results import read_results
from iec_eval.study import load
from iec_eval.study_plans import plan_study
from iec_eval.testing.tiny import TinyModel

REPETITIONS = 9


MACS_1X1 = 8 * 8  # of one pair of channels, on the images of the toy
Cost = Callable[..., EvaluationCost]


@pytest.fixture
def cost(write_study: Callable[..., Path], tmp_path: Path) -> Cost:
    """``cost(*efficiency)`` is the cost of a row with these methods."""

    def count(*efficiency: dict[str, Any]) -> EvaluationCost:
        rows = [{"name": "row", "efficiency": list(efficiency)}]
        study = load(str(write_study(tmp_path, variants=rows)))
        (plan,) = plan_study(study, load_registry())
        return evaluation_cost(plan)

    return count


def quantizer(**options: Any) -> dict[str, Any]:
    return {"name": "timestep-quantizer", **options}


def test_bit_operations_count_the_bits_of_both_operands(cost: Cost) -> None:
    plain, w8a8 = cost().full, cost(quantizer()).full
    assert plain.bit_operations == 32 * 32 * plain.macs
    assert w8a8.macs == plain.macs
    assert w8a8.bit_operations == 8 * 8 * plain.macs  # no product is left out
    fewer = cost(quantizer(weight_bits=4, activation_bits=6, softmax_bits=5)).full
    # the first and last layer, 3x3 between 1 and 8 channels, at 8 bits each
    edges = 2 * 9 * 8 * MACS_1X1
    products = attention_macs(cost)
    layers = plain.macs - edges - 2 * products
    wanted = 64 * edges + 4 * 6 * layers + (6 * 6 + 5 * 6) * products
    assert fewer.bit_operations == wanted


def attention_macs(cost: Cost) -> int:
    """Of one of the two products, of all attentions: by what one more bit of softmax adds."""
    more, less = (cost(quantizer(softmax_bits=bits)).full.bit_operations for bits in (8, 7))
    return (more - less) // 8


def test_attention_products_by_hand(cost: Cost) -> None:
    # 4 x 4 positions attend to each other, 16 channels, in 4 attentions
    assert attention_macs(cost) == 4 * 16 * 16 * 16


def test_weights_take_the_bytes_of_their_bits(cost: Cost) -> None:
    sizes = {bits: cost(quantizer(weight_bits=bits)).weight_bytes for bits in (8, 4)}
    assert sizes[4] < sizes[8] < cost().weight_bytes / 2
    cached = cost({"name": "deepcache", "interval": 2}, quantizer()).weight_bytes
    corrected = cost({"name": "cachequant", "interval": 2}).weight_bytes
    # per step: a, b of the feature's channels, alpha, beta of the outputs of two layers
    assert corrected - cached == 4 * 5 * 2 * (8 + 8 + 8)


@pytest.mark.slow
@torch.inference_mode()
def test_a_simulated_quantized_evaluation_is_not_absurdly_slow() -> None:
    """At most 1.6 of a full-precision one: weights are quantized once, not at every call."""
    model = packaged()
    clock, plain = Clock(2), model.load()
    quantized = build(TimestepQuantizer).apply(model.load(), clock, grids(model))
    sample, when = torch.randn(32, *model.shape), torch.full((32,), 500.0)
    inputs = model.condition(range(32)).inputs
    with one_thread():
        for network in (plain, quantized):
            network(sample, when, **inputs)
        pairs = [
            tuple(seconds(lambda n=network: n(sample, when, **inputs)) for network in both)
            for both in [(quantized, plain)] * REPETITIONS
        ]
    assert median(slow / fast for slow, fast in pairs) < 1.6


def grids(model: Any) -> dict[str, Tensor]:
    bench = Bench(model.load(), Clock(2), model, ddim(steps=2), seed=1, images=4)
    made: dict[str, Tensor] = build(TimestepQuantizer, {"search": "max"}).calibrate(bench)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 3])
@torch.inference_mode()
def test_time_of_a_cached_evaluation_is_its_share_of_the_arithmetic(cut: int) -> None:
    """Within 15 %, on a network of convolutions large enough to measure."""
    clock = Clock(2, [0])
    cached = CachedUNet(large_network(), cut, clock)
    sample, when = torch.randn(2, 3, 32, 32), torch.full((2,), 500.0)

    def evaluate(full: bool) -> Tensor:
        clock.full = full
        output: Tensor = cached(sample, when)
        return output

    with one_thread():
        evaluate(True)
        share = flops(lambda: evaluate(False)) / flops(lambda: evaluate(True))
        # in pairs, so that whatever slows the machine down for a while slows both; processor time,
        # so that waiting for it does not count
        pairs = [(seconds(lambda: evaluate(False)), seconds(lambda: evaluate(True)))
                 for _ in range(REPETITIONS)]  # fmt: skip
    measured = median(short / long for short, long in pairs)
    assert 0.2 < share < 0.8
    assert measured == pytest.approx(share, rel=0.15)


def large_network() -> Any:
    """As wide at every level, so that norms take the same part of the time everywhere."""
    network: Any = UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(96, 96, 96),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        add_attention=False,
    )
    return network.eval()


def flops(run: Callable[[], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def seconds(run: Callable[[], Tensor]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_method_that_cannot_be_counted_has_no_macs_and_takes_nobody_elses(
    cli: Callable[..., Result], write_study: Callable[..., Path], picky: None, tmp_path: Path
) -> None:
    method = [{"name": "picky"}]
    variants = [
        {"name": "full precision"},
        {"name": "picky", "efficiency": method},
        {"name": "picky + IEC", "efficiency": method, "callbacks": [{"name": "iec"}]},
    ]
    study, out = write_study(tmp_path, variants=variants), tmp_path / "out"
    why = "MACs not counted, RuntimeError: Tensor.item() cannot be called on meta tensors"
    shown = cli("show", study)
    assert (shown.exit_code, shown.stdout.count(why)) == (0, 2), shown.stdout
    assert "are not in it, nor picky, nor picky + IEC" in shown.stdout
    launched = cli("launch", study, "-o", out)
    assert launched.exit_code == 0, launched.stderr
    plain, *others = read_results(out / "results.json").variants
    assert plain.cost.relative_macs == 1
    for row in others:
        assert row.status == "done"
        assert (row.error or "").startswith(why)
        assert (row.cost.macs_per_image, row.cost.weight_bytes) == (None, None)
        assert row.cost.evaluations_full is not None
        assert row.metrics
    assert why in cli("table", out).stdout
    assert why in (out / "report.html").read_text()
    assert cli("status", out).exit_code == 0
    shutil.copytree(out, tmp_path / "other")
    assert cli("compare", out, tmp_path / "other").exit_code == 0
    scaled = cli("show", study, "--scale", "1")
    assert scaled.exit_code == 2
    assert "picky: its MACs cannot be counted; wanted --seconds-per-image" in scaled.stderr
    given = ("--seconds-per-image", "picky=2", "--seconds-per-image", "picky + IEC=4")
    assert cli("show", study, "--scale", "1", *given).exit_code == 0


def test_a_callback_that_cannot_be_counted_is_shown(
    cli: Callable[..., Result], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    source = """
from iec_eval.api import DenoisingCallback, hookimpl

class Late(DenoisingCallback):
    name = "late"

    def refine(self, step, prediction):
        raise ValueError("not before it is told what to do")

@hookimpl
def iec_eval_callbacks():
    return [Late]
"""
    with installed_plugin(tmp_path / "site", "late", source):
        study = write_study(tmp_path, variants=[{"name": "late", "callbacks": [{"name": "late"}]}])
        shown = cli("show", study)
    assert shown.exit_code == 0, shown.output
    assert "late: 5 steps, evaluations not known, - an image" in shown.stdout
    assert "MACs not counted, ValueError: not before it is told what to do" in shown.stdout


ENGINES = """
from iec_eval.api import DenoisingCallback, EfficiencyMethod, hookimpl

class Engine(EfficiencyMethod):
    name = "engine"

    def apply(self, network, clock, artifact):
        return open("/nowhere.engine")

class Reads(DenoisingCallback):
    name = "reads"

    def __init__(self, options):
        super().__init__(options)
        self.table = open("/nowhere.table")

    def refine(self, step, prediction):
        return prediction

@hookimpl
def iec_eval_efficiency_methods():
    return [Engine]

@hookimpl
def iec_eval_callbacks():
    return [Reads]
"""


def test_a_method_that_cannot_be_applied_fails_alone(
    cli: Callable[..., Result], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    variants = [{"name": "plain"}, {"name": "deployed", "efficiency": [{"name": "engine"}]}]
    with installed_plugin(tmp_path / "site", "engines", ENGINES):
        study = write_study(tmp_path, variants=variants)
        shown = cli("show", study)
        launched = cli("launch", study, "-o", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert "MACs not counted, FileNotFoundError: " in shown.stdout
    assert launched.exit_code == 1, launched.output
    found = {row.name: row for row in read_results(tmp_path / "out" / "results.json").variants}
    assert found["plain"].status == "done"
    assert found["deployed"].status == "failed"
    assert "/nowhere.engine" in (found["deployed"].error or "")


def test_a_part_that_cannot_be_made_is_wrong_configuration(
    cli: Callable[..., Result], write_study: Callable[..., Path], tmp_path: Path
) -> None:
    with installed_plugin(tmp_path / "site", "engines", ENGINES):
        study = write_study(tmp_path, variants=[{"name": "a", "callbacks": [{"name": "reads"}]}])
        shown = cli("show", study)
    assert shown.exit_code == 2, shown.output
    assert "reads: FileNotFoundError: " in shown.stderr
    assert "/nowhere.table" in shown.stderr


class _GaussianNoise(nn.Module):
    """The exact noise prediction for data of standard deviation 1/20."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        abar = torch.tensor([SCHEDULE.abar(t) for t in timestep.tolist()]).to(sample)[:, None, None]
        share = (1 - abar).sqrt() / (abar / 400 + 1 - abar)
        return share[..., None] * sample


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_no_fewer_corrections_are_expected_than_a_network_makes(tolerance: float) -> None:
    """Near the image a network changes faster than a smooth stand-in would."""
    options = {"weights": [0.5, 0.5], "tolerance": tolerance, "tolerance_mode": "relative"}
    sampler, iec = ddim(steps=250, spacing="ldm"), build(IEC, options)
    plan = plan_with(sampler, [iec])
    clock = Clock(len(sampler.timesteps))
    run(_GaussianNoise(), sampler, Noise(0, range(2), TinyModel().shape), [iec], clock=clock)
    spent = clock.evaluations.full / 2
    assert 500 < spent <= expected_evaluations(plan).full <= 750
    if tolerance == 1e-3:
        assert spent < 600  # many stop
    else:
        assert expected_evaluations(plan) == Evaluations(750, 0)
