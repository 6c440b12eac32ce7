"""Noise is a pure function of (seed, image, step, evaluation)."""

from __future__ import annotations

import itertools

import pytest
import torch

from iec_eval.noise import MixedDraw, Noise

SHAPE = (3, 4, 5)


def test_same_bits_in_any_batch() -> None:
    together = Noise(7, [5, 0, 12, 3], SHAPE)
    reordered = Noise(7, [3, 12, 5], SHAPE)
    assert torch.equal(together.initial()[[3, 2, 0]], reordered.initial())
    assert torch.equal(
        together.draw(4, evaluation=2).value[[3, 2, 0]], reordered.draw(4, evaluation=2).value
    )
    alone = [Noise(7, [image], SHAPE).initial() for image in (5, 0, 12, 3)]
    assert torch.equal(torch.cat(alone), together.initial())


def test_asking_in_another_order_changes_nothing() -> None:
    noise = Noise(7, [1, 2], SHAPE)
    late, early = noise.draw(9), noise.draw(0)
    first = late.value
    assert torch.equal(early.value, Noise(7, [1, 2], SHAPE).draw(0).value)
    assert torch.equal(noise.draw(9).value, first)
    assert late.value is first


def test_distinct_across_seed_image_step_and_evaluation() -> None:
    seeds, images, steps, evaluations = (0, 1, 2**62), (0, 1, 2**40), (0, 1, 99), (0, 1, 2)
    rows = [Noise(seed, images, SHAPE).initial() for seed in seeds]
    rows += [
        Noise(seed, images, SHAPE).draw(step, evaluation).value
        for seed, step, evaluation in itertools.product(seeds, steps, evaluations)
    ]
    numbers = torch.cat(rows).flatten(1)
    assert len(numbers) == 3 * 3 * (1 + 9)
    # even single numbers are distinct: no stream is a shifted copy of another
    assert len(numbers.unique()) > 0.999 * numbers.numel()


def test_calibration_is_never_shown_the_noise_of_scored_images() -> None:
    scored, shown = Noise(7, [1, 2], SHAPE), Noise(7, [1, 2], SHAPE, calibration=True)
    both = [scored.initial(), shown.initial(), scored.draw(3, 1).value, shown.draw(3, 1).value]
    assert len(torch.cat(both).unique()) == 4 * 2 * 3 * 4 * 5


def test_streams_are_uncorrelated() -> None:
    shape = (1, 64, 64)
    noise = Noise(3, [0, 1], shape)
    rows = [noise.initial(), noise.draw(0).value, noise.draw(1).value, noise.draw(0, 1).value]
    rows += [Noise(4, [0, 1], shape).initial()]
    rows += [Noise(3, [0, 1], shape, calibration=True).initial()]
    correlation = torch.corrcoef(torch.cat(rows).flatten(1)) - torch.eye(12)
    # twelve rows of 4096: the largest of 66 correlations is above 0.07 once in 10^4 times
    assert correlation.abs().max() < 0.07


def test_standard_normal() -> None:
    values = Noise(11, range(64), (3, 16, 16)).initial()
    assert values.dtype == torch.float32
    assert values.shape == (64, 3, 16, 16)
    count = values.numel()
    assert abs(float(values.mean())) < 4 / count**0.5
    assert abs(float(values.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((values**4).mean()) - 3) < 0.15


def test_golden_values() -> None:
    """A change of these numbers changes every image ever made with this program."""
    noise = Noise(1243, [0, 49999], (2, 1, 2))
    assert noise.initial().flatten().tolist() == pytest.approx(GOLDEN["initial"], abs=0)
    assert noise.draw(0).value.flatten().tolist() == pytest.approx(GOLDEN["step 0"], abs=0)
    later = noise.draw(99, evaluation=1).value
    assert later.flatten().tolist() == pytest.approx(GOLDEN["step 99, evaluation 1"], abs=0)


def test_mixed_draw_is_the_weighted_sum_and_lazy() -> None:
    noise = Noise(7, [1, 2], SHAPE)
    old, new = noise.draw(3), noise.draw(3, evaluation=1)
    weight = torch.tensor([0.0, 0.25]).view(-1, 1, 1, 1)
    mixed = MixedDraw(old, new, weight)
    assert "value" not in old.__dict__
    assert "value" not in new.__dict__
    assert torch.equal(mixed.value[0], old.value[0])
    torch.testing.assert_close(mixed.value[1], 0.75 * old.value[1] + 0.25 * new.value[1])


def test_a_draw_is_not_made_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Noise(7, [1], SHAPE)
    monkeypatch.setattr(noise, "_row", lambda *_: pytest.fail("drawn"))
    noise.draw(0)


GOLDEN = {
    "initial": [
        2.335942029953003,
        1.771250605583191,
        -1.2461020946502686,
        1.197960615158081,
        0.18421538174152374,
        0.5999717116355896,
        -1.1143369674682617,
        0.8634883761405945,
    ],
    "step 0": [
        -0.9669013023376465,
        0.8030039072036743,
        0.7201680541038513,
        -1.010769009590149,
        -0.22625790536403656,
        0.7992574572563171,
        -0.3559081554412842,
        -0.15138103067874908,
    ],
    "step 99, evaluation 1": [
        -0.4143112003803253,
        -0.7960156202316284,
        0.6267332434654236,
        0.36878108978271484,
        -0.109776072204113,
        0.6772362589836121,
        -0.6859712600708008,
        -0.6248001456260681,
    ],
}
