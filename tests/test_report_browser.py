"""The report in a real browser: clicked, typed at, looked at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, chromium
from large_report import large_study, pictures
from PIL import Image

from iec_eval.report.figures import figures
from iec_eval.report.page import report_page, write_report
from iec_eval.report.plots import quality_plot
from iec_eval.results import Results

WIDTHS, SCHEMES = (400, 1600), (False, True)
FIVE_MB = 5_000_000
NAMES = (
    "[...document.querySelectorAll('#rows tbody tr')].filter(r => !r.hidden)"
    ".map(r => r.dataset.number)"
)
SORTS = "[...document.querySelectorAll('#rows thead th')].map(h => h.getAttribute('aria-sort'))"

# Every element with text of its own: the contrast of its colour against what lies behind it
# (WCAG 2.2, section 1.4.3), and a hint to find it by.
CONTRASTS = """
(() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => c <= 0.04045 * 255 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const over = (top, below) => {
    const alpha = top[3] === undefined ? 1 : top[3];
    return [0, 1, 2].map((i) => alpha * top[i] + (1 - alpha) * below[i]);
  };
  const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
  const behind = (element) => element === null ? canvas
    : over(channels(getComputedStyle(element).backgroundColor), behind(element.parentElement));
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3 && n.data.trim());
    if (!text.length || !element.checkVisibility() || element.closest("script, title")) continue;
    const style = getComputedStyle(element);
    const svg = element instanceof SVGElement;
    const back = behind(svg ? element.closest("figure") : element);
    const [a, b] = [over(channels(svg ? style.fill : style.color), back), back].map(luminance);
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
      [element.tagName, element.getAttribute("class"), text[0].data.trim()].join(" ")]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def study() -> Results:
    return large_study()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, study: Results) -> Path:
    """The page of the study, with images and pictures of an analysis."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "analysis" / "W8A8").mkdir(parents=True)
    (folder / "analysis" / "W8A8" / "growth.svg").write_text(quality_plot(study) or "")
    rows = pictures(study)
    write_report(folder, study, rows, {"git": "abc", "versions": {"torch": "2"}}, columns=10)
    return folder / "report.html"


def heading(column: str) -> str:
    return f"#rows thead th:nth-child({column}) button"


def column_of(browser: Browser, title: str) -> int:
    """The place of a heading, from 1."""
    titles = browser.run("[...document.querySelectorAll('#rows .title')].map(t => t.textContent)")
    return int(next(n for n, text in enumerate(titles, 1) if text.startswith(title)))


def fid(row: Any) -> float | None:
    found = row.metrics.get("fid-fashion")
    return None if row.status == "failed" or found is None else found.value


def ordered(study: Results, key: Callable[[Any], float | None], sign: int) -> list[str]:
    """Numbers of rows by a key; those without one last, equal ones in the study's order."""
    rows = list(enumerate(study.variants, 1))
    with_key = [(n, k) for n, row in rows if (k := key(row)) is not None]
    without = [n for n, row in rows if key(row) is None]
    by_key = sorted(with_key, key=lambda pair: (sign * pair[1], pair[0]))
    return [str(n) for n in (*(n for n, _ in by_key), *without)]


# --- sorting and hiding ------------------------------------------------------------------------


def test_a_click_on_a_heading_sorts_up_down_and_back(
    browser: Browser, report: Path, study: Results
) -> None:
    browser.open(report)
    place = column_of(browser, "fid-fashion")
    states = []
    for order in (ordered(study, fid, 1), ordered(study, fid, -1), ordered(study, lambda _: 0, 1)):
        browser.click(f"#rows thead th:nth-child({place}) button")
        assert browser.run(NAMES) == order
        sorts = browser.run(SORTS)
        states.append(sorts[place - 1])
        assert {state for n, state in enumerate(sorts) if n != place - 1} == {"none"}
    assert states == ["ascending", "descending", "none"]
    assert browser.complaints() == []


def test_keys_sort_too_and_only_one_column_is_sorted(
    browser: Browser, report: Path, study: Results
) -> None:
    browser.open(report)
    place = column_of(browser, "MACs")
    browser.click(f"#rows thead th:nth-child({column_of(browser, 'fid-fashion')}) button")
    browser.run(f"document.querySelectorAll('#rows thead button')[{place - 2}].focus()")
    browser.press("Tab")  # on to the heading of MACs
    browser.press("Enter")

    def macs(row: Any) -> float | None:
        return None if row.status == "failed" else row.cost.relative_macs

    assert browser.run(NAMES) == ordered(study, macs, 1)
    browser.press(" ")
    assert browser.run(NAMES) == ordered(study, macs, -1)
    assert [n for n, s in enumerate(browser.run(SORTS), 1) if s != "none"] == [place]


def test_everything_can_be_reached_by_keyboard(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.run("document.body.focus()")
    reached = []
    for _ in range(40):
        browser.press("Tab")
        reached.append(
            browser.run("(e => e.id || e.textContent.trim().slice(0, 20))(document.activeElement)")
        )
    outline = browser.run("getComputedStyle(document.activeElement).outlineStyle")
    wanted = {"hide-controls", "view-images", "Evaluation protocol"}
    assert wanted <= set(reached)
    assert outline != "none"


def test_verdicts_sort_by_their_differences(browser: Browser, report: Path, study: Results) -> None:
    browser.open(report)
    browser.click(f"#rows thead th:nth-child({column_of(browser, 'vs base')}) button")

    def change(row: Any) -> float | None:
        found = [one.value for one in row.comparisons if one.relation == "base"]
        return found[0] if found and row.status == "done" else None

    assert browser.run(NAMES) == ordered(study, change, 1)


def test_the_button_hides_the_controls_everywhere_and_brings_them_back(
    browser: Browser, report: Path, study: Results
) -> None:
    browser.open(report)
    strips = "[...document.querySelectorAll('.strip')].filter(s => s.checkVisibility()).length"
    own = [str(n) for n, row in enumerate(study.variants, 1) if not row.control]
    images = browser.run(strips)
    browser.click("#hide-controls")
    assert browser.run(NAMES) == own
    assert browser.run(strips) == images - (len(study.variants) - len(own))
    assert browser.run("document.getElementById('hide-controls').ariaPressed") == "true"
    browser.click("#hide-controls")
    assert len(browser.run(NAMES)) == len(study.variants)


# --- what is shown -----------------------------------------------------------------------------


def test_the_verdict_columns_tell_each_kind_of_row(browser: Browser, report: Path) -> None:
    browser.open(report)
    cells = browser.run(
        "Object.fromEntries([...document.querySelectorAll('#rows tbody tr')].map(r =>"
        "[r.cells[0].dataset.key, [...r.cells].slice(2, 4).map(c => c.innerText)]))"
    )
    assert cells["DeepCache N=5"] == ["", ""]
    assert cells["DeepCache N=5 + IEC"] == [
        "worse\n+0.076 [+0.046, +0.106]",
        "worse\n+0.138 [+0.108, +0.168]\nDeepCache N=5, equal MACs",
    ]
    assert cells["PTQD + IEC, without its rivals"] == ["controls off", "controls off"]
    assert cells["W8A8, eta=1"] == ["partial", "partial"]
    assert cells["W2A8"] == []  # one cell that says why
    tip = browser.run("document.querySelector('#rows [data-number=\"3\"] td:nth-child(4)').title")
    assert tip == (
        "DeepCache N=5 + IEC is worse than DeepCache N=5, equal MACs (the same compute spent "
        "otherwise): fid-fashion +0.138 [+0.108, +0.168] (95 % interval that holds for all such "
        "rows together)."
    )
    assert "better" in browser.run("document.querySelector('.tally').innerText")


def test_unfinished_rows_are_in_no_comparison_and_no_plot(browser: Browser, report: Path) -> None:
    browser.open(report)
    browser.click("#compared summary")
    text = browser.run("document.getElementById('compared').innerText")
    titles = browser.run("[...document.querySelectorAll('svg title')].map(t => t.textContent)")
    assert "DeepCache N=5 + epsilon scaling" in text
    assert len(titles) == 23
    for name in ("W2A8", "W8A8, eta=1"):
        assert name not in text
        assert not [title for title in titles if name in title]


def visible(browser: Browser, kind: str) -> int:
    found = f"[...document.querySelectorAll('.strip .{kind}')].filter(e => e.checkVisibility())"
    return int(browser.run(f"{found}.length"))


@pytest.mark.parametrize("script", [True, False])
def test_the_difference_view_is_toggled_with_or_without_script(
    browser: Browser, report: Path, script: bool
) -> None:
    browser.open(report, script=script)
    rows = len(large_study().variants) - 1  # the failed one has no images
    assert (visible(browser, "images"), visible(browser, "difference")) == (rows, 0)
    browser.click("label[for=view-difference]")
    assert (visible(browser, "images"), visible(browser, "difference")) == (0, rows)
    assert visible(browser, "none") == 2  # full precision itself, and the partial row
    browser.press("ArrowLeft")
    assert (visible(browser, "images"), visible(browser, "difference")) == (rows, 0)


def test_every_picture_loads(browser: Browser, report: Path) -> None:
    browser.open(report)
    sizes = browser.run("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(sizes) == 24 + 22 + 1
    assert all(complete and width > 0 for complete, width in sizes)


def test_without_script_it_is_a_plain_table(browser: Browser, report: Path) -> None:
    browser.open(report, script=False)
    assert len(browser.run(NAMES)) == 25
    assert browser.run("document.querySelectorAll('#rows button').length") == 0
    assert not browser.run("document.getElementById('hide-controls').checkVisibility()")


# --- one file, no network ----------------------------------------------------------------------


def test_nothing_is_fetched_and_nothing_complains(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert browser.requests() == [report.resolve().as_uri()]
    assert browser.complaints() == []


def test_the_policy_blocks_what_a_name_might_smuggle_in(browser: Browser, report: Path) -> None:
    """Were escaping to fail: scripts do not run, and nothing can be loaded or sent."""
    browser.open(report)
    browser.run(
        "document.body.insertAdjacentHTML('beforeend', '<img id=x src=\"data:,\" "
        'onerror="window.ran = 1"><img src="http://127.0.0.1:9/a.png">\');'
        "const s = document.createElement('script'); s.textContent = 'window.ran = 2';"
        "document.body.append(s); fetch('http://127.0.0.1:9/b').catch(() => {});"
    )
    browser.click("h1")  # time for what was inserted to act
    assert browser.run("window.ran") is None
    blocked = " ".join(browser.complaints())
    assert blocked.count("Content Security Policy") >= 4
    for what in ("connect", "inline script", "inline event handler", "image"):
        assert what in blocked


def test_forty_rows_stay_below_five_megabytes(tmp_path: Path, study: Results) -> None:
    more = [row.model_copy(update={"name": f"{row.name} again"}) for row in study.variants[1:16]]
    whole = study.model_copy(update={"variants": [*study.variants, *more]})
    assert len(whole.variants) == 40
    rows = pictures(whole, side=256, channels=3)
    (tmp_path / "analysis").mkdir()
    for number in range(9):
        (tmp_path / "analysis" / f"{number}.png").write_bytes(bytes(399_000))
    drawn = figures(tmp_path / "analysis")
    page = report_page(whole, rows, {"a": "b" * 10_000}, columns=10, analysis=drawn)
    assert len(page.encode()) < FIVE_MB


# --- looks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", SCHEMES, ids=["light", "dark"])
def test_it_fits_and_is_legible(
    browser: Browser, report: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    browser.open(report, width=width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    contrasts = browser.run(CONTRASTS)
    assert len(contrasts) > 300
    assert [(ratio, where) for ratio, where in contrasts if ratio < 4.5] == []
    shot = browser.screenshot(whole=False)
    shot.save(tmp_path / "shot.png")
    assert shot.width == width
    assert blank_share(shot) < 0.97
    assert (shot.convert("L").getpixel((2, 2)) < 60) == dark


def blank_share(shot: Image.Image) -> float:
    """The share of the commonest colour."""
    colors = shot.convert("RGB").getcolors(1 << 24) or []
    return max(count for count, _ in colors) / (shot.width * shot.height)


def test_no_text_is_cut_or_covered(browser: Browser, report: Path) -> None:
    """Within the table no cell's words reach out of it, at either width."""
    for width in WIDTHS:
        browser.open(report, width=width)
        spilled = browser.run(
            "[...document.querySelectorAll('#rows th, #rows td')]"
            ".filter(c => c.scrollWidth > c.clientWidth + 1).map(c => c.innerText)"
        )
        assert spilled == []


def test_row_names_stay_in_view_on_a_phone(browser: Browser, report: Path) -> None:
    browser.open(report, width=400)
    browser.run("document.querySelector('.scroll.table').scrollLeft = 500")
    left = browser.run("document.querySelector('#rows tbody th').getBoundingClientRect().left")
    assert 0 <= left < 30


def test_it_prints_on_paper(browser: Browser, report: Path) -> None:
    browser.open(report)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF")
    assert 2 <= printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") <= 12
    browser.call("Emulation.setEmulatedMedia", media="print")
    hidden = ["#hide-controls", ".gallery label"]
    for selector in hidden:
        shown = f"document.querySelector({json.dumps(selector)}).checkVisibility()"
        assert not browser.run(shown)
    browser.call("Emulation.setEmulatedMedia", media="")
