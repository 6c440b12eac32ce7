"""Plans for a study: the rows that it names and its metrics, all of it checked before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from iec_eval.assembly import check_fit
from iec_eval.errors import ConfigError, Incompatible
from iec_eval.fingerprints import digest, identity, model_identity
from iec_eval.metrics.base import Metric, PairedMetric
from iec_eval.models.base import DiffusionModel
from iec_eval.planning import Plan, Planner, build, distinct_networks, planner
from iec_eval.plugins import Registry
from iec_eval.study import Experiment, Study, full_precision


def plan_study(study: Study, registry: Registry, lacking: list[str] | None = None) -> list[Plan]:
    """Plans for the rows that the study names and its full-precision controls.

    The other controls are added by ``controls.plan_with_controls``, which takes the same.

    Raises UnknownName, ConfigError or Incompatible, saying in which row.
    """
    plans, _ = own_plans(study, planner(study, registry, lacking))
    return plans


def plan_rows(planner: Planner, rows: Iterable[Experiment]) -> list[Plan]:
    """Plans for rows, whose methods fit the model's network.

    Raises UnknownName, ConfigError or Incompatible, saying in which row.
    """
    plans = [planner.plan(row) for row in rows]
    for plan in distinct_networks(plans).values():
        check_fit(plan)
    return plans


def own_plans(study: Study, planner: Planner) -> tuple[list[Plan], dict[str, str]]:
    """Plans for a study's own rows, and why others cannot be had, by name.

    Without a list of controls, one that the study has as a row of its own is left out, and so is a
    corrected one that a part refuses.

    Raises UnknownName, ConfigError or Incompatible, saying in which row.
    """
    rows = study.experiments()
    controls = [row for row in rows if row.control]
    named = plan_rows(planner, [row for row in rows if not row.control])
    there = {plan.fingerprint for plan in named}
    kept, refused = list[Plan](), dict[str, str]()
    for row in controls:
        try:
            plan = planner.plan(row)
        except ConfigError as error:
            if study.controls is not None or not row.callbacks:
                raise
            refused[row.name] = str(error).removeprefix(f"{row.name}: ")
            continue
        if study.controls is not None or plan.fingerprint not in there:
            kept.append(plan)
    return [*kept, *named], refused


def plan_metrics(
    study: Study, registry: Registry, plans: Sequence[Plan], lacking: list[str] | None = None
) -> list[Metric]:
    """The study's metrics, prepared for its model's images, their number and the rows there are.

    With a list ``lacking``, files that are not there are no error but noted in it.

    Raises UnknownName, ConfigError, Incompatible or CorruptFile for a metric that cannot be had.
    """
    model = plans[0].model
    metrics: list[Metric] = []
    for position, part in enumerate(study.metrics):
        metric = build(registry, "metric", part, f"metrics[{position}]")
        if isinstance(metric, PairedMetric):
            reference = _reference(plans, study, metric.name)
            metric.reference_row = reference.experiment.name
            metric.reference_digest = digest(
                [model_identity(model, reference.identity), identity(reference.sampler)]
            )
        _prepare(metric, study.images.count, model, lacking)
        if metric.network is not None:
            metric.network.check(model.image_shape)
        metrics.append(metric)
    return metrics


def _prepare(metric: Metric, count: int, model: DiffusionModel, lacking: list[str] | None) -> None:
    if lacking is not None:
        missing = metric.missing()  # hashes weights: asked for once
        lacking += [line for line in missing if line not in lacking]
        if missing or model.missing():
            return
    metric.bind(model)
    metric.prepare(count)


def _reference(plans: Iterable[Plan], study: Study, metric: str) -> Plan:
    rows = {plan.experiment.name: plan for plan in plans}
    row = full_precision(plan.experiment for plan in rows.values())
    if row is None:
        raise Incompatible(
            f"{metric}: compares rows with the full-precision one, but study {study.study!r} has "
            "no row without efficiency methods and callbacks; add controls: [full-precision]"
        )
    return rows[row.name]
