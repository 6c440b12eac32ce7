"""A study of 25 rows as a report may meet it: controls, verdicts, failures, the paper's numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iec_eval.results import (
    Comparison,
    Cost,
    Delta,
    Interval,
    Judgement,
    Measurement,
    Results,
    Variant,
    with_relative_costs,
)
from iec_eval.study import Relation

IEC: list[dict[str, Any]] = [{"name": "iec", "preset": "paper"}]
HEUN: list[dict[str, Any]] = [{"name": "iec", "preset": "heun"}]
SCALING: list[dict[str, Any]] = [{"name": "epsilon-scaling"}]
FULL_MACS, FULL = 2.27e9, 20
SPREAD = 0.012  # half the width of an interval, per unit of FID
METHODS: dict[str, tuple[float, float, int, float]] = {
    # FID without and with IEC, full evaluations, share of the full MACs
    "DeepCache N=5": (0.310, 0.386, 4, 0.45),
    "DeepCache N=3": (0.221, 0.212, 7, 0.58),
    "W8A8": (0.227, 1.480, 20, 1.0),
    "W4A8, reconstructed": (0.301, 0.300, 20, 1.0),
    "CacheQuant N=5 W8A8": (0.350, 0.302, 4, 0.45),
}


def measured(value: float, name: str = "", base: float = 0.0) -> dict[str, Measurement]:
    """FID and IS with intervals, and the change from ``base`` if a name is given."""
    half = SPREAD * (1 + 10 * value)
    change = value - base
    delta = Delta(versus=name, value=change, ci95=around(change, half)) if name else None
    score = 5.6 - value
    return {
        "fid-fashion": Measurement(value=value, ci95=around(value, half), delta=delta),
        "is-fashion": Measurement(value=score, ci95=around(score, 0.09)),
        "is-std-fashion": Measurement(value=0.25),
    }


def around(value: float, half: float) -> Interval:
    return value - half, value + half


def cost(full: float, cached: float, share: float, weights: int = 10_000_000) -> Cost:
    macs = share * FULL_MACS
    return Cost(
        evaluations_full=full,
        evaluations_cached=cached,
        macs_per_image=macs,
        bit_operations_per_image=macs * (64 if weights < 5_000_000 else 1024),
        seconds_per_image=0.0589 * share,
        weight_bytes=weights,
    )


def held(versus: str, relation: Relation, value: float, half: float = 0.03) -> Comparison:
    low, high = around(value, half)
    word: Judgement = "not distinguishable"
    if high < 0 or low > 0:
        word = "better" if value < 0 else "worse"
    return Comparison(
        versus=versus,
        relation=relation,
        metric="fid-fashion",
        value=value,
        ci95=(low, high),
        level=0.975 if relation == "equal-cost" else 0.95,
        judgement=word,
    )


def family(name: str, plain: float, corrected: float, full: int, share: float) -> list[Variant]:
    """A method, the method with IEC, and the rows that judge it."""
    quantized = "W" in name
    shared: dict[str, Any] = {
        "fingerprint": f"{abs(hash(name)):x}"[:8],
        "simulated": quantized,
        "efficiency": [{"name": name}],
    }
    weights = 2_600_000 if quantized else 10_000_000
    cached = 0 if full == FULL else FULL - full
    twice = cost(2 * full, cached, share + full / FULL, weights)
    rivals = {f"{name}, equal MACs": 0.8 * plain, f"{name} + Heun": 1.02 * corrected}
    against = [
        held(name, "base", corrected - plain),
        *(held(rival, "equal-cost", corrected - value) for rival, value in rivals.items()),
        held(f"{name} + epsilon scaling", "zero-cost", corrected - 1.01 * plain),
    ]
    callbacks = ([], HEUN)
    return [
        Variant(
            name=name, metrics=measured(plain), cost=cost(full, cached, share, weights),
            paper={"fid": round(14 * plain, 2)}, judge_of={f"{name} + IEC": "base"}, **shared,
        ),
        Variant(
            name=f"{name} + IEC", callbacks=IEC, metrics=measured(corrected, name, plain),
            cost=twice, paper={"fid": round(13 * plain, 2)}, comparisons=against,
            doubt="the table prints this row twice, with two numbers" if full == 7 else None,
            **shared,
        ),
        *(
            Variant(
                name=rival, control=True, callbacks=parts, metrics=measured(value), cost=twice,
                judge_of={f"{name} + IEC": "equal-cost"}, **shared,
            )
            for (rival, value), parts in zip(rivals.items(), callbacks, strict=True)
        ),
    ]  # fmt: skip


def large_study() -> Results:
    """Every state a row may be in, in one document."""
    plain = Variant(
        name="full precision", fingerprint="f0", control=True, metrics=measured(0.153),
        cost=cost(FULL, 0, 1.0), paper={"fid": 4.04},
    )  # fmt: skip
    alone = Variant(
        name="PTQD + IEC, without its rivals", fingerprint="f1", efficiency=[{"name": "ptqd"}],
        callbacks=IEC, metrics=measured(0.41), cost=cost(40, 0, 2.0),
    )  # fmt: skip
    failed = Variant(
        name="W2A8", fingerprint="f2", efficiency=[{"name": "w2"}], status="failed",
        error="RuntimeError: reconstruction of up_blocks.1.resnets.0.conv1 diverged, step 412",
        comparisons=[held("full precision", "full-precision", -9.0)],
        metrics=measured(0.001), cost=cost(1, 0, 0.01),
    )  # fmt: skip
    partial = Variant(
        name="W8A8, eta=1", fingerprint="f3", efficiency=[{"name": "w8"}], callbacks=IEC,
        status="partial", error="images 1280-1999 are missing", simulated=True,
        metrics=measured(0.002), cost=cost(20, 0, 0.02),
        comparisons=[held("W8A8", "base", -9.0)],
    )  # fmt: skip
    scaled = Variant(
        name="DeepCache N=5 + epsilon scaling", fingerprint="f4", control=True,
        efficiency=[{"name": "DeepCache N=5"}], callbacks=SCALING, metrics=measured(0.296),
        cost=cost(4, 16, 0.45), comparisons=[held("DeepCache N=5", "base", -0.014)],
        judge_of={"DeepCache N=5 + IEC": "zero-cost"},
    )  # fmt: skip
    families = [row for name, numbers in METHODS.items() for row in family(name, *numbers)]
    variants = [plain, *families, scaled, alone, failed, partial]
    study = Results(
        study="fashion-mnist, every method",
        images=2000,
        protocol={"fid-fashion": {"features": "fashion-mnist", "sha256": "ab" * 32}},
        controls=["full-precision"],
        variants=variants,
    )
    return with_relative_costs(study)


def pictures(results: Results, *, side: int = 32, channels: int = 1) -> list[tuple[str, Tensor]]:
    """Ten images of every row that has some, as a step of the noise they share."""
    generator = torch.Generator().manual_seed(0)
    shape = (10, channels, side, side)
    common = torch.rand(shape, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(common, 5, stride=1, padding=2)
    base = ((smooth - smooth.min()) / (smooth.max() - smooth.min()) * 255).round()
    rows = []
    for number, row in enumerate(results.variants):
        if row.status == "failed":
            continue
        noise = torch.randn(shape, generator=generator) * (0.0 if number == 0 else 2.0 + number)
        rows.append((row.name, (base + noise).clamp(0, 255).byte()))
    return rows
