"""The files of an analyzed row, and what is said of it on a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from iec_eval.analysis import plots
from iec_eval.analysis.bench import Subject
from iec_eval.report.wording import with_interval
from iec_eval.storage import write_json, write_text

Found = Mapping[str, Any]
Cells = list[list[Any]]


def write_row(subject: Subject, found: Mapping[str, Found]) -> str:
    """Write JSON, CSV and plot of every part that was found; a paragraph on the row."""
    lines = [subject.name]
    for part, content in found.items():
        write_json(subject.folder / f"{part}.json", content)
        write_text(subject.folder / f"{part}.csv", _csv(TABLES[part](content)))
        drawn = plots.PLOTS[part](content)
        picture = subject.folder / f"{part}.svg"
        if drawn is None:
            picture.unlink(missing_ok=True)  # of what was there before
        else:
            write_text(picture, drawn)
        lines += [f"  {line}" for line in TEXTS[part](content)]
    if "recommendation" in found:
        snippet = {"callbacks": found["recommendation"]["callbacks"]}
        text = yaml.safe_dump(snippet, sort_keys=False, default_flow_style=None)
        write_text(subject.folder / "recommendation.yaml", text)
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, to two digits."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} seconds"


def _csv(cells: Cells) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(cells)
    return text.getvalue()


def _spectral_table(found: Found) -> Cells:
    relaxed = [f"{value:g}" for value in found["lambdas"]]
    head = ["step", "timestep", "full", "A", "B", "image", "norm_A_I_plus_B_J", "norm_J"]
    rows: Cells = [[*head, *(f"norm_grad_G_{value}" for value in relaxed), "converged"]]
    for step in found["steps"]:
        norms = step["norms"]
        for image in range(found["images"]):
            values = [norms[name][image]["value"] for name in ("step", "jacobian", *relaxed)]
            converged = all(norm[image]["converged"] for norm in norms.values())
            place = [step["step"], step["timestep"], step["full"], step["a"], step["b"], image]
            rows.append([*place, *values, converged])
    return rows


def _spectral_text(found: Found) -> list[str]:
    steps = found["steps"]
    if not steps:
        return ["spectral norms: no step to measure", *_left_out(found)]
    above = sum(step["images_above_one"] for step in steps)
    pairs = len(steps) * found["images"]
    largest = max(steps, key=lambda step: step["norm_step_max"])
    least = min(step["norm_step_max"] for step in steps)
    relaxed = {
        value: sum(value in step["contracting_lambdas"] for step in steps)
        for value in found["lambdas"]
    }
    safe = [f"{value:g}" for value, count in relaxed.items() if count == len(steps)]
    lines = [
        f"||A I + B J||: {largest['norm_step_max']:.4g} at step {largest['step']}, the largest of "
        f"{len(steps)} steps; {least:.5g} the least; above 1 in {above} of {pairs} (image, step)",
        f"||grad G|| below 1 at every measured step for lambda {', '.join(safe) or 'none tried'}",
    ]
    if found["not_converged"]:
        lines.append(
            f"NOT CONVERGED: {found['not_converged']} of {found['searches']} norms, which may be "
            "too low; raise --iterations"
        )
    if found["largest_adjoint_error"] > 1e-3:
        lines.append(
            f"DERIVATIVES DISAGREE: <Jv, u> and <v, J'u> differ by "
            f"{found['largest_adjoint_error']:.1e}: some layer's are not what they say"
        )
    return [*lines, *_left_out(found)]


def _left_out(found: Found) -> list[str]:
    steps = found["left_out"]
    return [f"steps {steps} left out: {found['left_out_because']}"] if steps else []


def _growth_table(found: Found) -> Cells:
    head = ["run", "versus", "step", "mean", "std", "relative"]
    rows: Cells = [[*head, *(f"image_{i}" for i in range(found["images"]))]]
    for series in found["series"]:
        for step, distances in enumerate(series["distance"]):
            numbers = [series[name][step] for name in ("mean", "std", "relative")]
            rows.append([series["run"], series["versus"], step, *numbers, *distances])
    return rows


def _growth_text(found: Found) -> list[str]:
    lines = [_series_text(series) for series in found["series"]]
    if isinstance(found["correction"], str):
        lines.append(f"no growth with correction: {found['correction']}")
    return lines


def _series_text(series: Found) -> str:
    fit, last = series["fit"], f"{series['mean'][-1]:.3g} +- {series['std'][-1]:.2g}"
    kind: str = fit["better"]
    head = f"||delta|| of {series['run']} to {series['versus']}: {last} at the end; "
    if "linear" not in fit:
        return head + kind
    curves = ", ".join(f"{name} R2 {fit[name]['r2']:.3f}" for name in fit if name != "better")
    verdict = "no curve fits" if kind == "none" else f"{kind} fits best"
    return f"{head}{verdict} ({curves})"


def _residual_table(found: Found) -> Cells:
    names = ["size", "before", "after_half", "after_lambda", "after_one", "after_own"]
    rows: Cells = [["step", "timestep", "full", "lambda", "image", *names]]
    for step in found["steps"]:
        place = [step["step"], step["timestep"], step["full"], step["lambda"]]
        for image in range(found["images"]):
            values = [step[name][image] if step[name] is not None else "" for name in names]
            rows.append([*place, image, *values])
    return rows


def _residual_text(found: Found) -> list[str]:
    if found["refused"]:
        return [f"no residuals, and no recommendation: {found['refused']}"]
    tried = [
        ("the row's own correction", found["contracts_own"]),
        ("lambda 0.5", found["contracts_half"]),
        ("the best lambda of the step", found["contracts_lambda"]),
    ]
    told = [
        f"{name} in {100 * share['share']:.0f} % of {share['pairs']}"
        for name, share in tried
        if share is not None
    ]
    return [f"residual smaller after a correction: {'; '.join(told)} (image, step)"]


def _recommendation_table(found: Found) -> Cells:
    names = ["step", "lambda", "lambda_measured", "gain", "macs"]
    chosen = set(found["chosen"])
    rows = [[*(step[name] for name in names), step["step"] in chosen] for step in found["steps"]]
    return [[*names, "chosen"], *rows]


def _recommendation_text(found: Found) -> list[str]:
    if not found["chosen"]:
        return [
            f"recommended: no correction; within {100 * found['budget']:g} % more "
            "multiply-accumulates no step's residual can be made smaller"
        ]
    snippet = yaml.safe_dump(
        {"callbacks": found["callbacks"]}, sort_keys=False, default_flow_style=None, width=1000
    )
    head = (
        f"recommended within {100 * found['budget']:g} % more multiply-accumulates "
        f"({100 * found['extra_macs']:.1f} % spent), by residual removed, not by image quality:"
    )
    return [head, *(f"  {line}" for line in snippet.splitlines()), *_scored_text(found["scored"])]


def _scored_text(scored: Mapping[str, Sequence[str]]) -> list[str]:
    """What image quality has said so far of correcting, beside what the residual says."""
    if not scored:
        return ["image quality has not been asked: see the ablation"]
    told = "; ".join(f"{word}: {', '.join(labels)}" for word, labels in scored.items())
    warning = "" if "better" in scored else ", so expect no gain of this"
    return [
        f"image quality of the choices that were scored, against no correction: {told}{warning}"
    ]


def _ablation_table(found: Found) -> Cells:
    scored = [row["measured"] for row in found["choices"] if row["measured"] is not None]
    metrics = list(scored[0]["metrics"]) if scored else []
    names = ["evaluations_full", "evaluations_cached", "predicted_overhead"]
    gaps = [f"{name}_difference{end}" for name in metrics for end in ("", "_low", "_high")]
    rows: Cells = [["label", *names, "measured_overhead", "overhead_seconds", *metrics, *gaps]]
    for choice in found["choices"]:
        told = choice["measured"] or _UNMEASURED
        values = [told["overhead"], told["overhead_seconds"]]
        values += [told["metrics"].get(name, "") for name in metrics]
        for name in metrics:
            gap = told["differences"].get(name, {"value": "", "ci95": None})
            values += [gap["value"], *(gap["ci95"] or ("", ""))]
        rows.append([choice["label"], *(choice[name] for name in names), *values])
    return rows


_UNMEASURED: Found = {"overhead": "", "overhead_seconds": "", "metrics": {}, "differences": {}}


def _ablation_text(found: Found) -> list[str]:
    told = [_choice_text(choice) for choice in found["choices"][1:]]
    if all(choice["measured"] is None for choice in found["choices"]):
        return ["overhead of correcting " + "; ".join(told)]
    none = _scores_text(found["choices"][0]["measured"])
    head = f"overhead of correcting, and scores of {found['images']} images (uncorrected: {none})"
    return [head, *(f"  {line}" for line in told)]


def _choice_text(choice: Found) -> str:
    text, told = f"{choice['label']} {_percent(choice['predicted_overhead'])}", choice["measured"]
    if told is None:
        return text
    return f"{text}, measured {_percent(told['overhead'])}: {_scores_text(told)}"


def _percent(share: float | None) -> str:
    return "not counted" if share is None else f"{100 * share:.1f} %"


def _scores_text(measured: Found) -> str:
    scores = [
        f"{name} {value:.4g}{_gap_text(measured['differences'].get(name))}"
        for name, value in measured["metrics"].items()
        if value is not None
    ]
    return ", ".join(scores)


def _gap_text(gap: Found | None) -> str:
    """The difference to the uncorrected row, and what it says."""
    if gap is None or gap["ci95"] is None:
        return ""
    told = with_interval(gap["value"], gap["ci95"], 4, "+")
    return f" ({told}, {gap['judgement']})" if gap["judgement"] else f" ({told})"


TABLES: Mapping[str, Callable[[Found], Cells]] = {
    "spectral": _spectral_table,
    "growth": _growth_table,
    "residuals": _residual_table,
    "recommendation": _recommendation_table,
    "ablation": _ablation_table,
}
TEXTS: Mapping[str, Callable[[Found], Sequence[str]]] = {
    "spectral": _spectral_text,
    "growth": _growth_text,
    "residuals": _residual_text,
    "recommendation": _recommendation_text,
    "ablation": _ablation_text,
}
