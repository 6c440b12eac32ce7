"""Which steps are full: every schedule, alone and as DeepCache finds and follows it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import build, ddim, oracle, unet
from torch import Tensor

from iec_eval.calibration import Bench
from iec_eval.clock import Clock
from iec_eval.denoising import Denoiser, denoise
from iec_eval.efficiency.deepcache import CachedUNet, DeepCache
from iec_eval.efficiency.schedules import (
    centred_power_schedule,
    dps_schedule,
    group_limits,
    power_schedule,
    uniform_schedule,
)
from iec_eval.errors import ConfigError
from iec_eval.noise import Noise
from iec_eval.testing import TinyModel


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- formulas ---------------------------------------------------------------------------------


def parts(name: str) -> list[float]:
    """The numbers in a recorded case's name: T100_N5_p1.5 is 100, 5, 1.5."""
    return [float(word[1:]) for word in name.split("_")]


def recorded(kind: str) -> dict[str, list[int]]:
    tensors, _ = oracle("schedules")
    place = f"out/{kind}/"
    return {k.removeprefix(place): v.tolist() for k, v in tensors.items() if k.startswith(place)}


def test_recorded_uniform_schedules() -> None:
    for name, wanted in recorded("uniform").items():
        total, interval = map(int, parts(name))
        assert uniform_schedule(total, interval) == wanted, name


def test_recorded_power_schedules() -> None:
    cases = recorded("power")
    assert len(cases) == 8
    for name, wanted in cases.items():
        total, interval, power = parts(name)
        assert power_schedule(int(total), int(interval), power) == wanted, name


def test_recorded_centred_schedules_with_the_signed_power() -> None:
    _, about = oracle("schedules")
    for name, case in about["center"].items():
        total, interval, center, power = parts(name)
        found = centred_power_schedule(int(total), int(interval), power, int(center))
        assert found == case["signed_power_version_own"]["list"], name


def test_power_schedule_by_hand() -> None:
    # u = 0, 1, 2, 3 of 0 .. sqrt(16)
    assert power_schedule(16, 4, 2.0) == [0, 1, 4, 9]
    assert power_schedule(16, 4, 1.0) == [0, 4, 8, 12]


def test_centred_schedule_by_hand() -> None:
    # u = -2, 0, 2, (4): offsets -4, 0, 4; the first is taken as step 0
    assert centred_power_schedule(20, 7, 2.0, 4) == [0, 4, 8]


@pytest.mark.parametrize("total", range(1, 41))
def test_schedules_are_sorted_steps_of_the_run(total: int) -> None:
    for interval in range(1, total + 1):
        count = math.ceil(total / interval)
        for power in (1.0, 1.2, 1.5, 3.0):
            found = [power_schedule(total, interval, power)]
            assert len(found[0]) <= count
            for center in {0, total // 3, total - 1}:
                found.append(centred_power_schedule(total, interval, power, center))
                assert len(found[-1]) == count
            for steps in found:
                assert steps == sorted(set(steps))
                assert steps[0] == 0
                assert steps[-1] < total


# --- dynamic programming ----------------------------------------------------------------------


def groupings(total: int, groups: int, limits: tuple[int, int]) -> Iterator[list[int]]:
    """Every list of group starts with that many groups of a legal length."""
    least, most = limits
    if groups == 0:
        if total == 0:
            yield []
        return
    for length in range(least, min(most, total) + 1):
        for starts in groupings(total - length, groups - 1, limits):
            yield [*starts, total - length]


def cost(distances: Tensor, starts: list[int], total: int) -> float:
    ends = [*starts[1:], total]
    return sum(float(distances[j, : n - j].sum()) for j, n in zip(starts, ends, strict=True))


@pytest.mark.parametrize("total", range(1, 13))
def test_dps_equals_trying_every_grouping(total: int) -> None:
    for interval in range(1, total + 1):
        distances = random(total, total, seed=total * 100 + interval)
        distances[:, 0] = 0
        limits, groups = group_limits(total, interval), math.ceil(total / interval)
        every = list(groupings(total, groups, limits))
        found = dps_schedule(distances, interval)
        assert found in every
        assert cost(distances, found, total) == min(cost(distances, s, total) for s in every)
        free = list(groupings(total, groups, (1, total)))
        found = dps_schedule(distances, interval, limited=False)
        assert cost(distances, found, total) == min(cost(distances, s, total) for s in free)


@pytest.mark.parametrize(("total", "interval"), [(100, 10), (100, 15), (250, 20), (51, 5), (7, 5)])
def test_dps_keeps_the_number_of_groups_and_their_lengths(total: int, interval: int) -> None:
    found = dps_schedule(random(total, min(2 * interval, total), seed=3), interval)
    lengths = [b - a for a, b in pairwise([*found, total])]
    assert len(found) == math.ceil(total / interval)
    assert found[0] == 0
    assert math.ceil(interval / 2) <= min(lengths)
    assert max(lengths) <= 2 * interval


def test_dps_of_features_that_move_evenly_is_nearly_uniform() -> None:
    distances = torch.arange(20.0).expand(100, 20)
    assert dps_schedule(distances, 10) == uniform_schedule(100, 10)


def test_dps_refreshes_where_features_change() -> None:
    positions = torch.cat([torch.zeros(30), torch.ones(10), torch.full((10,), 2.0)])
    ahead = [[abs(float(positions[min(j + k, 49)] - positions[j])) for k in range(50)]
             for j in range(50)]  # fmt: skip
    assert {0, 30, 40} <= set(dps_schedule(torch.tensor(ahead), 10))


def test_dps_without_a_legal_grouping() -> None:
    with pytest.raises(ValueError, match="no schedule of 10 steps has groups of at most 3 steps"):
        dps_schedule(torch.zeros(10, 3), 5)


def by_hand(features: Tensor, length: int) -> Tensor:
    """L1 distances of features ``[T, ...]``, straight from the definition."""
    total = len(features)
    distances = torch.zeros(total, length, dtype=torch.float64)
    for j in range(total):
        for k in range(min(length, total - j)):
            distances[j, k] = (features[j + k].double() - features[j].double()).abs().sum()
    return distances


def test_recorded_dps_schedules() -> None:
    tensors, _ = oracle("schedules")
    for kind, limited in (("dps", True), ("dps_unconstrained", False)):
        cases = recorded(kind)
        assert cases
        for name, wanted in cases.items():
            total, interval = map(int, parts(name))
            length = min(2 * interval, total) if limited else total
            distances = by_hand(tensors[f"in/features/T{total}"], length)
            assert dps_schedule(distances, interval, limited=limited) == wanted, name


# --- as DeepCache's options -------------------------------------------------------------------

STEPS = 9


def bench_of(model: TinyModel, images: int = 11, steps: int = STEPS) -> Bench:
    return Bench(model.load(), Clock(steps), model, ddim(steps=steps), seed=5, images=images)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"interval": 3}, [0, 3, 6]),
        ({"interval": 3, "schedule": "power", "power": 2.0}, [0, 1, 4]),
        ({"interval": 3, "schedule": "centred-power", "power": 1.0, "center": 4}, [0, 3, 6]),
        ({"interval": 9, "schedule": "power"}, [0]),
    ],
)
def test_schedules_without_calibration(options: dict[str, Any], wanted: list[int]) -> None:
    method = build(DeepCache, options)
    assert not method.needs_calibration
    assert method.calibrate(bench_of(TinyModel())) == {}
    assert method.full_steps(STEPS, {}) == wanted


def features_by_hand(model: TinyModel, cut: int, images: int) -> Tensor:
    """F_t of every step along the network's own trajectory, from a loop of its own."""
    clock = Clock(STEPS)
    cached, kept = CachedUNet(model.load(), cut, clock), list[Tensor]()

    def keep(*_: Any) -> None:
        assert cached.feature is not None
        kept.append(cached.feature)

    cached.register_forward_hook(keep)
    noise = Noise(5, range(images), model.shape)
    with torch.no_grad():
        denoise(ddim(steps=STEPS), Denoiser(cached, model.condition(noise.images), clock), noise)
    return torch.stack(kept)


@pytest.mark.parametrize("interval", [2, 4, 7, 9])
def test_dps_is_calibrated_on_the_features_of_full_trajectories(interval: int) -> None:
    model = TinyModel()
    method = build(DeepCache, {"interval": interval, "cut": 2, "schedule": "dps"})
    assert method.needs_calibration
    bench = bench_of(model)
    artifact = method.calibrate(bench)
    wanted = dps_schedule(by_hand(features_by_hand(model, 2, 11), STEPS), interval)
    assert method.full_steps(STEPS, artifact) == wanted
    assert len(method.full_steps(STEPS, {})) == len(wanted)  # as costs are read beforehand
    assert bench.clock.full_steps == frozenset(range(STEPS))


def test_dps_sees_every_step_whatever_is_cached_before_it() -> None:
    method = build(DeepCache, {"interval": 4, "cut": 2, "schedule": "dps"})
    wanted = method.calibrate(bench_of(TinyModel()))
    bench = bench_of(TinyModel())
    bench.clock.full_steps = frozenset({0, 4})
    assert torch.equal(method.calibrate(bench)["full_steps"], wanted["full_steps"])
    assert bench.clock.full_steps == {0, 4}


def test_dps_looks_at_so_many_images_at_most() -> None:
    options = {"interval": 4, "cut": 2, "schedule": "dps", "schedule_images": 3}
    few = build(DeepCache, options).calibrate(bench_of(TinyModel(), images=3))
    many = build(DeepCache, options).calibrate(bench_of(TinyModel(), images=40))
    assert torch.equal(few["full_steps"], many["full_steps"])
    denoised: list[int] = []

    class Counting(Bench):
        def run(self, callbacks: Any, *, images: int | None = None, **options: Any) -> None:
            denoised.append(images or self.images)
            super().run(callbacks, images=images, **options)

    bench = bench_of(TinyModel(), images=40)
    build(DeepCache, options).calibrate(Counting(**vars(bench)))
    assert denoised == [3]


def test_every_distance_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """T L of them for a batch, whatever the number of groups."""
    measured: list[tuple[int, int]] = []
    method = build(DeepCache, {"interval": 3, "cut": 2, "schedule": "dps"})
    before = torch.Tensor.__setitem__

    def count(table: Tensor, place: Any, value: Any) -> None:
        if isinstance(place, tuple) and len(place) == 2 and table.shape == (STEPS, 6):
            measured.append(place)
        before(table, place, value)

    monkeypatch.setattr(torch.Tensor, "__setitem__", count)
    method.calibrate(bench_of(TinyModel(), images=8))
    assert len(measured) == len(set(measured))
    assert len(measured) == sum(min(6, STEPS - j) for j in range(STEPS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 10}, "interval 10 is longer than the run of 9 steps; give at most 9"),
        (
            {"interval": 3, "schedule": "centred-power", "center": 9},
            "center 9 is beyond the run of 9 steps; give at most 8",
        ),
    ],
)
def test_options_that_do_not_fit_the_run(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DeepCache, options).full_steps(STEPS, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval: .* greater than or equal to 1, got 0"),
        ({"interval": 2, "schedule": "dynamic"}, "'uniform', 'power', 'centred-power' or 'dps'"),
        ({"interval": 2, "power": 1.2}, "power has no effect on the schedule uniform; leave it"),
        ({"interval": 2, "schedule": "power", "center": 1}, "or take schedule centred-power"),
        ({"interval": 2, "schedule": "power", "power": 0.9}, "greater than or equal to 1"),
        ({"interval": 2, "schedule_images": 9}, "or take schedule dps"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DeepCache, options)


def test_the_network_is_as_before_after_dps() -> None:
    model = TinyModel(network=unet())
    bench = bench_of(model)
    modules = list(bench.network.modules())
    build(DeepCache, {"interval": 3, "cut": 2, "schedule": "dps"}).calibrate(bench)
    assert list(bench.network.modules()) == modules
