"""The report: one HTML file that needs nothing else, and the files beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from iec_eval.report.figures import Figure, figures
from iec_eval.report.filmstrips import filmstrips
from iec_eval.report.gallery import GalleryRow, differences, gallery
from iec_eval.report.judgements import AGAINST, tally
from iec_eval.report.plots import front_of, quality_plot
from iec_eval.report.results_table import columns, compared, lines
from iec_eval.report.tables import remarks, table
from iec_eval.report.verdicts import verdicts
from iec_eval.report.wording import reading_note
from iec_eval.results import Results
from iec_eval.storage import atomic_path
from iec_eval.study import full_precision

ANALYSIS = "analysis"  # the folder of a run whose pictures come into its page
_HERE = Path(__file__).parent


def write_report(
    folder: Path,
    results: Results,
    gallery_rows: Sequence[GalleryRow],
    manifest: Mapping[str, Any],
    *,
    columns: int = 8,
    current: Collection[str] | None = None,
    scored: bool = False,
) -> list[Path]:
    """Write ``table.md``, ``report.html`` and, where there are images, the gallery as PNG files.

    ``gallery.png`` has the images, ``gallery-difference.png`` what sets them apart from full
    precision; where the rows have just been ``scored``, one that there is nothing for any more is
    deleted. Pictures under ``folder/analysis`` are brought into the page, of analyzed rows those
    that are ``current`` (see :func:`figures`). Returns the paths that were written.
    """
    reference, unfinished = _reference(results), _unfinished(results)
    apart, _ = differences(gallery_rows, reference or "", left_out=unfinished)
    page = report_page(
        results,
        gallery_rows,
        manifest,
        columns=columns,
        analysis=figures(folder / ANALYSIS, current),
    )
    files = {
        folder / "table.md": table([results], "md").encode(),
        folder / "gallery.png": _png(gallery_rows, columns) if gallery_rows else b"",
        folder / "gallery-difference.png": _png(apart, columns) if apart else b"",
        folder / "report.html": page.encode(),
    }
    for path, content in files.items():
        if content:
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
        elif scored:
            path.unlink(missing_ok=True)
    return [path for path, content in files.items() if content]


def _png(rows: Sequence[GalleryRow], columns: int) -> bytes:
    file = BytesIO()
    gallery(rows, columns=columns).save(file, format="PNG")
    return file.getvalue()


def report_page(
    results: Results,
    gallery_rows: Sequence[GalleryRow],
    manifest: Mapping[str, Any],
    *,
    columns: int = 8,
    analysis: Sequence[Figure] = (),
) -> str:
    """A self-contained HTML page: what was compared, how to read it, and every number.

    Without images, without pictures of an analysis, or without a row that can be plotted, that
    part is left out. Nothing in the page can reach the network, and the only script that runs is
    the page's own: the policy in its head holds the script's hash.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        **_numbers(results),
        **_pictures(results, gallery_rows, columns),
        analysis=[(group, list(some)) for group, some in groupby(analysis, lambda f: f.group)],
        folded=_folded(results, manifest),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
    )


def _numbers(results: Results) -> dict[str, Any]:
    shown = columns(results)
    counts = {header: tally(results, against) for against, header in AGAINST.items()}
    return {
        "study": results.study,
        "done": sum(row.status == "done" for row in results.variants),
        "reading": reading_note([results]),
        "notes": remarks([results]),
        "columns": shown,
        "lines": lines(results, shown),
        "controls": sum(row.control for row in results.variants),
        "tally": {header: count for header, count in counts.items() if count},
        "compared": compared(results),
        "sentences": verdicts(results),
    }


def _pictures(
    results: Results,
    gallery_rows: Sequence[GalleryRow],
    columns: int,
) -> dict[str, Any]:
    unfinished = _unfinished(results)
    controls = {row.name for row in results.variants if row.control}
    plot = quality_plot(results)
    return {
        "plot": None if plot is None else Markup(plot),
        "front": front_of(results),
        "gallery": filmstrips(
            gallery_rows, _reference(results), left_out=unfinished, columns=columns
        ),
        "unfinished": unfinished,
        "control_names": controls,
    }


def _reference(results: Results) -> str | None:
    row = full_precision(results.variants)
    return None if row is None else row.name


def _unfinished(results: Results) -> set[str]:
    return {row.name for row in results.variants if row.status != "done"}


def _folded(results: Results, manifest: Mapping[str, Any]) -> dict[str, str]:
    keys = {
        "fingerprint",
        "control",
        "efficiency",
        "callbacks",
        "judge_of",
        "lacks",
        "paper",
        "doubt",
    }
    parts = {row.name: row.model_dump(include=keys) for row in results.variants}
    values = {
        "Evaluation protocol": results.protocol,
        "Rows and their parts": parts,
        "Configuration and provenance": manifest,
    }
    return {
        title: json.dumps(value, indent=2, ensure_ascii=False, default=str)
        for title, value in values.items()
    }
