"""The report: one HTML file that needs nothing else, and the files beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

from iec_eval.report.gallery import GalleryRow, gallery
from iec_eval.report.plots import quality_plot
from iec_eval.report.tables import Directions, Grid, ending, grid, table
from iec_eval.report.verdicts import verdicts
from iec_eval.results import Results
from iec_eval.storage import atomic_path


def write_report(
    folder: Path,
    results: Results,
    gallery_rows: Sequence[GalleryRow],
    manifest: Mapping[str, Any],
    *,
    directions: Directions | None = None,
    columns: int = 8,
) -> list[Path]:
    """Write ``table.md``, ``gallery.png`` (if there are rows for it) and ``report.html``.

    Returns the paths that were written.
    """
    picture = _png(gallery_rows, columns) if gallery_rows else b""
    files = {
        folder / "table.md": table([results], "md", directions).encode(),
        folder / "gallery.png": picture,
        folder / "report.html": report_page(
            results, picture, manifest, directions=directions
        ).encode(),
    }
    written = {path: content for path, content in files.items() if content}
    for path, content in written.items():
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return list(written)


def _png(rows: Sequence[GalleryRow], columns: int) -> bytes:
    file = BytesIO()
    gallery(rows, columns=columns).save(file, format="PNG")
    return file.getvalue()


def report_page(
    results: Results,
    gallery_png: bytes,
    manifest: Mapping[str, Any],
    *,
    directions: Directions | None = None,
) -> str:
    """A self-contained HTML page: what was compared, how to read it, and every number.

    Without gallery bytes, or without a row that can be plotted, that part is left out.
    """
    shown = grid([results], directions)
    sections = [
        _section("Results", _table(shown) + _paragraphs(shown.notes)),
        _side_by_side(
            _section("Quality against cost", _plot(quality_plot(results, directions))),
            _section("At equal cost", _list(verdicts(results, directions))),
        ),
        _section("The same noise, side by side", _gallery(gallery_png)),
        _section("Provenance", _folded("Evaluation protocol", results.protocol)),
        _folded("Rows and their parts", _parts(results)),
        _folded("Configuration and provenance", manifest),
    ]
    title, lead = escape(results.study), escape(_lead(results, shown))
    return _PAGE.substitute(title=title, lead=lead, sections="\n".join(sections))


def _lead(results: Results, shown: Grid) -> str:
    done = sum(row.status == "done" for row in results.variants)
    return (
        f"{done} of {len(results.variants)} rows are finished. {shown.reading} Image i of every "
        "row starts from the same noise, so rows differ only in how the images were made. Read a "
        "difference together with what it costs: a callback such as IEC takes extra evaluations "
        "of the network, so compare rows at equal relative MACs; the same row without the "
        "callback is the cheaper one, not the fair rival."
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def _side_by_side(*sections: str) -> str:
    shown = [f"<div>{section}</div>" for section in sections if section]
    return f'<div class="pair">{"".join(shown)}</div>' if shown else ""


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f'<p class="note">{escape(text)}</p>\n' for text in texts)


def _list(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def _table(shown: Grid) -> str:
    # explicit roles: laid out as cards on a narrow screen, a table would lose its own
    heads = "".join(f'<th role="columnheader">{_header(text)}</th>' for text in shown.headers)
    body = "".join(
        _table_row(shown.headers, cells) + _ending_row(ending(row.variant), len(cells))
        for row, cells in zip(shown.rows, shown.cells, strict=True)
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results">'
        f'<table role="table"><thead role="rowgroup"><tr role="row">{heads}</tr></thead>\n'
        f'<tbody role="rowgroup">{body}</tbody></table></div>\n'
    )


def _header(text: str) -> str:
    # a line may end after a slash, but not before an arrow
    return escape(text).replace("/", "/<wbr>").replace(" ↑", "&nbsp;↑").replace(" ↓", "&nbsp;↓")


def _table_row(headers: Sequence[str], cells: Sequence[str]) -> str:
    name = f'<th role="rowheader" scope="row">{escape(cells[0])}</th>'
    numbers = "".join(
        f'<td role="cell" data-label="{escape(header)}">{escape(cell)}</td>'
        for header, cell in zip(headers[1:], cells[1:], strict=True)
    )
    return f'<tr role="row">{name}{numbers}</tr>\n'


def _ending_row(text: str, width: int) -> str:
    cell = f'<td role="cell" class="ending" colspan="{width}">{escape(text)}</td>'
    return f'<tr role="row">{cell}</tr>\n' if text else ""


def _plot(svg: str | None) -> str:
    if svg is None:
        return ""
    return (
        f'<figure class="plot" role="img" aria-label="Quality against cost, one point per row; '
        f'the table has the same numbers">{svg}'
        "<figcaption>Circles: without callbacks. Diamonds: with callbacks, each with an arrow "
        "from the row it is compared with.</figcaption></figure>"
    )


def _gallery(png: bytes) -> str:
    if not png:
        return ""
    data = base64.b64encode(png).decode()
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Images of every row">'
        '<img alt="One labelled row of images per variant; a column shares its noise" '
        f'src="data:image/png;base64,{data}"></div>'
    )


def _parts(results: Results) -> dict[str, Any]:
    keys = {"fingerprint", "control", "efficiency", "callbacks", "paper", "doubt"}
    return {row.name: row.model_dump(include=keys) for row in results.variants}


def _folded(title: str, value: Mapping[str, Any]) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return (
        f"<details><summary>{escape(title)}</summary>"
        f'<pre tabindex="0">{escape(text)}</pre></details>'
    )


_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2329; --soft: #59636e; --line: #d0d7de;
  --paper: #ffffff; --panel: #f5f7f9; --bad: #b3261e; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --soft: #9aa5b1; --line: #3a434d; --paper: #14181d;
    --panel: #1d232a; --bad: #ff8a80; --link: #79b8ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 3rem) 4rem; max-width: 76rem;
  color: var(--ink); background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p, li, figcaption { max-width: 46rem; overflow-wrap: anywhere; }
.note, figcaption { color: var(--soft); font-size: .9rem; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .5rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: baseline; }
th:first-child, td.ending { text-align: left; overflow-wrap: break-word; }
th:first-child { min-width: 11rem; max-width: 24rem; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.ending { color: var(--bad); }
figure { margin: 0; }
.plot svg { display: block; width: 100%; max-width: 36rem; height: auto; }
.pair { display: grid; gap: 0 3rem; }
@media (min-width: 64rem) { .pair { grid-template-columns: 36rem 1fr; } }
ul { margin: 0; padding-left: 1.2rem; }
li { margin-bottom: .6rem; }
.scroll { overflow-x: auto; }
.scroll img { display: block; max-width: none; border-radius: 6px; border: 1px solid var(--line); }
details { border: 1px solid var(--line); border-radius: 6px; margin: .75rem 0;
  background: var(--panel); }
summary { cursor: pointer; padding: .6rem .9rem; font-weight: 600; }
pre { margin: 0; padding: .5rem .9rem .9rem; overflow-x: auto; font-size: .85rem; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
@media (max-width: 44rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr, th, td { display: block; width: 100%; }
  tr { border-bottom: 1px solid var(--line); padding: .6rem 0; }
  th, td { border: 0; padding: .12rem 0; }
  tbody th:first-child { font-size: 1rem; min-width: 0; max-width: none; }
  td[data-label] { display: flex; justify-content: space-between; gap: 1rem; }
  td[data-label]::before { content: attr(data-label); color: var(--soft); text-align: left; }
}
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p>$lead</p>
$sections
</main>
</body>
</html>
""")
