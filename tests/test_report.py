"""Tables, plot, gallery and page: whole outputs, and nothing a name could break."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
import torch
from PIL import Image
from torch import Tensor

from iec_eval.errors import ConfigError, Incompatible
from iec_eval.report.gallery import cell_corner, gallery
from iec_eval.report.page import report_page, write_report
from iec_eval.report.plots import quality_plot
from iec_eval.report.tables import table
from iec_eval.report.verdicts import verdicts
from iec_eval.report.wording import decimals, higher_is_better, quantity, significant
from iec_eval.results import (
    Cost,
    Measurement,
    Results,
    Variant,
    with_deltas,
    with_relative_costs,
)

IEC = [{"name": "iec"}]
CACHE = [{"name": "deepcache", "interval": 3}]
NASTY = "<b>x</b> & \"$y$\" 'z' | _^"


def row(name: str, fid: float, macs: float, **more: Any) -> Variant:
    cost = Cost(
        evaluations_full=more.pop("full", 20),
        evaluations_cached=more.pop("cached", 0),
        macs_per_image=macs,
        seconds_per_image=macs / 1e10,
        weight_bytes=1_834_000,
    )
    metrics = {"fid-fashion": Measurement(value=fid, ci95=more.pop("ci95", None))}
    return Variant(name=name, fingerprint="ab", metrics=metrics, cost=cost, **more)


def toy(*rows: Variant, **more: Any) -> Results:
    parts: dict[str, Any] = {"study": "toy", "images": 1000, "protocol": {"id": "p1"}, **more}
    return with_relative_costs(with_deltas(Results(variants=list(rows), **parts)))


def small() -> Results:
    return toy(
        row("Full", 9.873, 2.46e8, control=True),
        row("Cached", 11.92, 1.524e8, efficiency=CACHE, full=7, cached=13),
        row("Cached + IEC", 10.77, 2.385e8, efficiency=CACHE, callbacks=IEC, full=14, cached=13),
    )


def uneven() -> Results:
    """A failed row that still carries numbers, and a partial one."""
    failed = row(
        NASTY, 77.77, 6.66e8, status="failed", error="no <memory>\nleft", efficiency=[{"name": "q"}]
    )
    partial = row(
        "W4", 22.3, 1e8, status="partial", error="612 of 1000 images", simulated=True,
        efficiency=[{"name": "q4"}], paper={"fid-fashion": 4.32},
    )  # fmt: skip
    return toy(row("Full", 9.873, 2.46e8), failed, partial)


MARKDOWN = """\
| variant      | fid-fashion (N=1000) ↓ | evaluations/image | MACs/image | relative MACs |  \
seconds/image | weights |
| ------------ | ---------------------: | ----------------: | ---------: | ------------: | \
-------------: | ------: |
| Full         |                   9.87 |                20 |      246 M |         1.00x | \
0.0246 (1.00x) | 1.83 MB |
| Cached       |                  11.92 |     7 + 13 cached |      152 M |         0.62x | \
0.0152 (0.62x) | 1.83 MB |
| Cached + IEC |          10.77 (-1.15) |    14 + 13 cached |      238 M |         0.97x | \
0.0238 (0.97x) | 1.83 MB |

1,000 images per row. FID is biased upward below 50,000 images, and small differences are noise. \
No confidence intervals yet.

In parentheses after a metric: its change against another row (Cached + IEC against Cached).

Callbacks cost extra evaluations: compare rows at equal relative MACs.
"""

LATEX = "\n".join(
    [
        r"\begin{tabular}{lrrrrrr}",
        r"\toprule",
        r"variant & fid-fashion (N=1000) $\downarrow$ & evaluations/image & MACs/image & "
        r"relative MACs & seconds/image & weights \\",
        r"\midrule",
        r"Full & 9.87 & 20 & 246 M & 1.00x & 0.0246 (1.00x) & 1.83 MB \\",
        r"Cached & 11.92 & 7 + 13 cached & 152 M & 0.62x & 0.0152 (0.62x) & 1.83 MB \\",
        r"Cached + IEC & 10.77 (-1.15) & 14 + 13 cached & 238 M & 0.97x & 0.0238 (0.97x) & "
        r"1.83 MB \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\par {\footnotesize 1,000 images per row. FID is biased upward below 50,000 images, "
        r"and small differences are noise. No confidence intervals yet.}",
        r"\par {\footnotesize In parentheses after a metric: its change against another row "
        r"(Cached + IEC against Cached).}",
        r"\par {\footnotesize Callbacks cost extra evaluations: compare rows at equal relative "
        r"MACs.}",
        "",
    ]
)

CSV = """\
study,variant,fingerprint,control,simulated,status,error,images,fid-fashion,fid-fashion_ci95_low,\
fid-fashion_ci95_high,fid-fashion_delta,fid-fashion_delta_versus,fid-fashion_delta_ci95_low,\
fid-fashion_delta_ci95_high,evaluations_full,evaluations_cached,macs_per_image,relative_macs,\
bit_operations_per_image,relative_bit_operations,seconds_per_image,relative_seconds,weight_bytes
toy,A,ab,True,False,done,,1000,2.0,1.5,2.5,,,,,20.0,0.0,200.0,1.0,,,2e-08,1.0,1834000
toy,B,ab,False,False,done,,1000,1.5,,,-0.5,A,,,40.0,0.0,400.0,2.0,,,4e-08,2.0,1834000
"""


def test_markdown_whole() -> None:
    assert table([small()], "md") == MARKDOWN


def test_latex_whole() -> None:
    assert table([small()], "latex") == LATEX


def test_csv_whole_and_json_alike() -> None:
    results = toy(
        row("A", 2.0, 200.0, control=True, ci95=(1.5, 2.5)),
        row("B", 1.5, 400.0, callbacks=IEC, full=40),
    )
    assert table([results], "csv") == CSV
    found = json.loads(table([results], "json"))
    lines = csv.DictReader(io.StringIO(CSV))
    as_text = [{k: "" if v is None else str(v) for k, v in record.items()} for record in found]
    assert as_text == list(lines)
    assert found[1]["error"] is None
    assert found[1]["fid-fashion_delta"] == -0.5


def doubtful() -> Results:
    """Rows with the paper's numbers, two of them doubtful for one reason and one for another."""
    shared = {"doubt": "the table has <two> headings", "efficiency": CACHE}
    return toy(
        row("Full", 9.8, 2e8, control=True),
        row("A", 9.9, 1e8, paper={"fid": 4.32}, **shared),
        row("B", 9.7, 1e8, paper={"fid": 3.76, "is": 40.5}, **shared),
        row("C", 9.6, 1e8, efficiency=CACHE, doubt="not printed"),
        row("D", 9.5, 1e8, efficiency=CACHE, paper={"fid": 5.0}),
    )


def test_a_doubtful_number_says_so_and_why() -> None:
    lines = table([doubtful()], "md").splitlines()
    cells = [line.split("|")[-2].strip() for line in lines if line.startswith("| ")]
    assert cells[:1] == ["paper"]
    assert cells[2:] == [
        "-", "fid 4.32 (doubtful)", "fid 3.76, is 40.5 (doubtful)", "- (doubtful)", "fid 5"
    ]  # fmt: skip
    notes = [line for line in lines if line.startswith("(doubtful), ")]
    assert notes == [
        "(doubtful), A, B: the table has \\<two> headings", "(doubtful), C: not printed"
    ]  # fmt: skip
    page = report_page(doubtful(), b"", {})
    assert ">fid 4.32 (doubtful)</td>" in page
    assert "(doubtful), A, B: the table has &lt;two&gt; headings" in page
    assert "&quot;doubt&quot;: &quot;not printed&quot;" in page


def test_doubts_are_columns_of_their_own_where_there_are_any() -> None:
    reasons = [record["doubt"] for record in json.loads(table([doubtful()], "json"))]
    assert reasons == [None, *["the table has <two> headings"] * 2, "not printed", None]
    assert "doubt" not in json.loads(table([small()], "json"))[0]
    assert table([doubtful()], "csv").splitlines()[0].endswith(",paper_fid,paper_is,doubt")


def test_intervals_are_shown_and_end_the_warning() -> None:
    text = table([toy(row("A", 2.0, 200.0, ci95=(1.5, 2.5)), images=50_000)], "md")
    assert re.search(r"\| A +\| +2.000 \[1.500, 2.500\] \|", text)
    assert text.endswith("\n\n50,000 images per row.\n")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="'xml': wanted one of md, csv, json, latex"):
        table([small()], "xml")


def test_a_failed_row_never_gets_numbers_and_a_partial_one_is_marked() -> None:
    lines = table([uneven()], "md").splitlines()
    failed = next(line for line in lines if "[failed]" in line)
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", failed)[2:-1]]
    assert cells == ["-"] * 7
    assert "\\<b>x\\</b> & \"$y$\" 'z' \\| _^ [failed]: no \\<memory> left" in lines
    partial = next(line for line in lines if line.startswith("| W4 (simulated) [partial]"))
    assert "22.30 (N<1000)" in partial
    assert partial.endswith("| fid-fashion 4.32 |")
    assert "W4 [partial]: 612 of 1000 images" in lines
    for form in ("md", "csv", "json", "latex"):
        assert not re.search(r"77\.?7|666", table([uneven()], form)), form


def test_latex_escapes_what_latex_reads() -> None:
    text = table([uneven()], "latex")
    assert (
        r"\textless{}b\textgreater{}x\textless{}/b\textgreater{} \& "
        r""""\$y\$" 'z' | \_\textasciicircum{} {[}failed]"""
    ) in text


def test_several_results_share_one_table_only_with_one_protocol() -> None:
    more = toy(row("Other", 8.0, 1e9), study="second", images=5000)
    text = table([small(), more], "md")
    assert re.search(r"\| second \| Other +\| +8.00 \(N=5000\) \|", text)
    assert re.search(r"\| toy    \| Full +\| +9.87 \(N=1000\) \|", text)
    assert "1,000 or 5,000 images per row. FID falls as images are added" in text
    other = toy(row("Other", 8.0, 1e9), protocol={"id": "p2"})
    with pytest.raises(Incompatible, match=r"id \('p1' and 'p2'\)"):
        table([small(), other], "md")


def test_directions_come_from_the_name_unless_given() -> None:
    names = ("fid", "fid-fashion", "fid:tf", "is", "is-fashion", "is_std", "island", "other")
    found = [higher_is_better(name) for name in names]
    assert found == [False, False, False, True, True, None, None, None]
    assert higher_is_better("other", {"other": True}) is True
    assert "fid-fashion (N=1000) ↑" in table([small()], "md", {"fid-fashion": True})


def test_numbers_are_worded_to_be_read() -> None:
    assert [quantity(n) for n in (0, 5, 999.4, 999.9, 1.5e9, 2e16)] == [
        "0", "5.00", "999", "1.00 k", "1.50 G", "20.0 P",
    ]  # fmt: skip
    assert [significant(n) for n in (1234.5, 99.99, 99.9, 0.01234)] == [
        "1234", "100", "99.9", "0.0123",
    ]  # fmt: skip
    assert [decimals([n]) for n in (0.0, 0.0012, 1.5, 12.0, 150.0, 99999.0)] == [2, 6, 3, 2, 1, 0]


def test_a_verdict_compares_at_equal_cost() -> None:
    def verdict(fid: float, macs: float) -> str:
        plain = (row("P", 10.0, 100.0), row("Q", 9.0, 200.0))
        return verdicts(toy(*plain, row("C", fid, macs, efficiency=CACHE, callbacks=IEC)))[0]

    assert verdict(9.5, 200.0) == (
        "C (fid-fashion 9.50 at 2.00x MACs): no better than Q (fid-fashion 9.00 at 2.00x MACs), "
        "which costs no more."
    )
    assert verdict(8.5, 200.0).endswith(
        "better than every row without callbacks that costs no more; the nearest is "
        "Q (fid-fashion 9.00 at 2.00x MACs)."
    )
    assert verdict(9.5, 150.0).endswith("those cost 1.00x MACs at most: no rival of equal cost.")
    assert verdict(9.5, 50.0).endswith("untested, no row without callbacks costs as little.")


def test_no_verdict_without_a_direction_or_from_unfinished_rows() -> None:
    unclear = row("C", 1.0, 1.0, callbacks=IEC)
    other = unclear.model_copy(update={"metrics": {"other": Measurement(value=1.0)}})
    assert verdicts(toy(other)) == []
    assert len(verdicts(toy(other), {"other": True})) == 1
    assert verdicts(toy(row("C", 1.0, 1.0, callbacks=IEC, status="partial"))) == []


def pictures(count: int, channels: int = 1, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(count + channels)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def shown(sheet: Image.Image, place: tuple[int, int], size: int, scale: int) -> Tensor:
    """The image in a cell, [3, size, size]; fails unless each pixel is one uniform square."""
    left, top = cell_corner(*place, (size * scale, size * scale))
    cut = sheet.crop((left, top, left + size * scale, top + size * scale))
    pixels = torch.tensor(list(cut.tobytes()), dtype=torch.uint8)
    squares = pixels.view(size, scale, size, scale, 3).permute(0, 2, 4, 1, 3).flatten(3)
    assert (squares == squares[..., :1]).all()
    return squares[..., 0].permute(2, 0, 1)


def test_each_gallery_cell_holds_its_image_enlarged() -> None:
    grey, color = pictures(5), pictures(3, channels=3)
    sheet = gallery([("grey", grey), ("color", color)], columns=4)
    for column in range(4):
        assert torch.equal(shown(sheet, (0, column), 16, 4), grey[column].expand(3, -1, -1))
    for column in range(3):
        assert torch.equal(shown(sheet, (1, column), 16, 4), color[column])
    assert (shown(sheet, (1, 3), 16, 4) == 255).all()
    assert cell_corner(1, 2, (64, 64)) == (4 + 2 * 68, 4 + (22 + 64 + 8) + 22)
    assert sheet.size == (4 + 4 * 68, 2 * (22 + 64 + 8))


def test_gallery_labels_are_above_their_rows_and_never_cut() -> None:
    sheet = gallery([("W" * 40, pictures(1)), ("", pictures(1))], columns=1, scale=1)
    ink = [x for x in range(sheet.width) if sheet.getpixel((x, 14)) != (255, 255, 255)]
    assert min(ink) < 10
    assert 400 < max(ink) < sheet.width - 2
    assert sheet.getpixel((100, 20)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (pictures(1).float(), {}, r"got torch.float32 \[1, 1, 16, 16\]"),
        (pictures(1, size=8), {}, "wanted uint8 images"),
        (pictures(1, channels=2), {}, "wanted uint8 images"),
        (pictures(1)[0], {}, "wanted uint8 images"),
        (pictures(1), {"columns": 0}, "columns=0"),
        (pictures(1), {"scale": 0}, "scale=0"),
    ],
)
def test_a_gallery_refuses_what_it_cannot_show(
    images: Tensor, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        gallery([("first", pictures(1)), ("second", images)], **options)


def test_a_gallery_needs_rows() -> None:
    with pytest.raises(ConfigError, match="got 0 rows"):
        gallery([])


def test_the_plot_is_the_same_every_time_whatever_the_users_style() -> None:
    first = quality_plot(small())
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "xtick.labelsize": 40}):
        assert quality_plot(small()) == first
        assert mpl.rcParams["font.size"] == 30


def labels(svg: str) -> list[str]:
    return [found.text or "" for found in ElementTree.fromstring(svg).iter() if found.text]


def test_the_plot_names_its_rows_axes_and_arrows() -> None:
    svg = quality_plot(small())
    assert svg is not None
    found = labels(svg)
    assert {"Full", "Cached", "Cached + IEC"} <= set(found)
    assert "fid-fashion (N=1000), lower is better" in found
    assert "MACs per image, relative to full precision" in found
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert svg.startswith("<svg")


def test_a_plot_arrow_leads_from_a_row_to_the_same_row_with_a_callback() -> None:
    rows = (row("Plain", 9.0, 1e8), row("IEC", 8.0, 2e8, callbacks=IEC))
    joined = quality_plot(toy(*rows))
    apart = quality_plot(Results(study="toy", images=1000, protocol={}, variants=list(rows)))
    assert joined is not None
    assert apart is not None
    assert joined.count('id="patch_') - apart.count('id="patch_') == 1


def test_the_plot_survives_any_name_and_leaves_unfinished_rows_out() -> None:
    svg = quality_plot(toy(row(NASTY, 2.0, 1.0), row("gone", 1.0, 1.0, status="partial")))
    assert svg is not None
    assert NASTY in labels(svg)
    assert "gone" not in svg


def label_boxes(svg: str, beginning: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of the labels, with letters 5 units wide and 8 high."""
    form = r'text-anchor: (\w+)[^>]*? x="([\d.]+)" y="([\d.]+)"[^>]*>(' + beginning + "[^<]*)<"
    boxes = []
    for anchor, x, y, text in re.findall(form, svg):
        width = 5.0 * len(text)
        left = float(x) - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
        boxes.append((left, float(y) - 8, left + width, float(y)))
    return boxes


def test_plot_labels_do_not_cover_each_other() -> None:
    crowd = [row(f"long name {n}", 9.0, 100.0 + n / 1000) for n in range(5)]
    svg = quality_plot(toy(*crowd, row("far away", 20.0, 200.0)))
    assert svg is not None
    boxes = label_boxes(svg, "long")
    assert len(boxes) == 5
    for one, other in combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)


def test_a_label_that_stands_away_is_tied_to_its_point() -> None:
    def lines(rows: int) -> int:
        svg = quality_plot(toy(*(row(f"long name {n}", 9.0, 100 + n / 1000) for n in range(rows))))
        assert svg is not None
        return len(re.findall(r'style="[^"]*stroke-width: 0\.7', svg))

    assert lines(1) == 0  # beside its point
    assert lines(14) >= 3


def test_there_is_no_plot_without_cost_or_quality() -> None:
    assert quality_plot(toy()) is None
    bare = Variant(name="a", fingerprint="b", metrics={"fid": Measurement(value=1.0)})
    assert quality_plot(toy(bare)) is None


VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


class Page(HTMLParser):
    """The tags, attributes and text of a page; fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def whole_page(results: Results | None = None) -> str:
    manifest = {"config": {"note": "</pre><script>alert(1)</script>"}, "path": Path("x")}
    return report_page(results or uneven(), b"\x89PNG", manifest)


def test_the_page_is_well_formed_and_says_everything() -> None:
    page = Page(whole_page(small()))
    text = "".join(page.text)
    for wanted in (
        "Full",
        "Cached",
        "Cached + IEC",
        "10.77 (-1.15)",
        "0.97x",
        "equal relative MACs",
    ):
        assert wanted in text
    assert "1,000 images per row. FID is biased upward below 50,000 images" in text
    assert page.tags.count("details") == 3
    assert page.tags.count("svg") == 1
    assert ("src", "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()) in (
        page.attributes
    )


def test_the_page_escapes_every_name() -> None:
    results = uneven()
    text = whole_page(results.model_copy(update={"study": "<i>study</i>"}))
    page = Page(text)
    assert not {"b", "i", "script"} & set(page.tags)
    assert NASTY + " [failed]" in page.text
    assert NASTY + " [failed]: no <memory>\nleft" in page.text
    assert "<i>study</i>" in page.text


def test_the_page_needs_nothing_else() -> None:
    text = whole_page()
    links = re.findall(r'(\S*?)="?(?:https?:)?//', text)
    assert all(link.startswith("xmlns") for link in links)
    assert not re.search(r"@import|<script|<link|url\((?!#)", text)
    loaded = [value for name, value in Page(text).attributes if name in ("src", "href")]
    assert all(value.startswith("data:") for value in loaded)


def test_the_page_leaves_out_what_there_is_not() -> None:
    page = Page(report_page(toy(), b"", {}))
    assert "img" not in page.tags
    assert "svg" not in page.tags
    assert "At equal cost" not in page.text


def test_write_report_writes_the_files_whole(tmp_path: Path) -> None:
    rows = [("Full", pictures(9)), ("Cached", pictures(9))]
    written = write_report(tmp_path / "out", small(), rows, {"git": "abc"}, columns=3)
    assert [path.name for path in written] == ["table.md", "gallery.png", "report.html"]
    assert sorted(tmp_path.glob("out/*")) == sorted(written)
    assert written[0].read_text(encoding="utf-8") == MARKDOWN
    with Image.open(written[1]) as picture:
        assert torch.equal(shown(picture, (1, 2), 16, 4), rows[1][1][2].expand(3, -1, -1))
    picture_text = base64.b64encode(written[1].read_bytes()).decode()
    assert picture_text in written[2].read_text(encoding="utf-8")


def test_write_report_without_images_makes_no_gallery(tmp_path: Path) -> None:
    written = write_report(tmp_path, small(), [], {})
    assert [path.name for path in written] == ["table.md", "report.html"]
