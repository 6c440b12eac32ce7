"""Tables, plot, gallery and page: whole outputs, and nothing a name could break."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
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
from large_report import large_study
from PIL import Image
from torch import Tensor

from iec_eval.errors import ConfigError, Incompatible
from iec_eval.report import plots
from iec_eval.report.figures import LARGEST, figures
from iec_eval.report.filmstrips import filmstrips
from iec_eval.report.gallery import cell_corner, differences, gallery
from iec_eval.report.judgements import Against, Judged, absent, comparisons, judged
from iec_eval.report.page import report_page, write_report
from iec_eval.report.plots import front_of, quality_plot
from iec_eval.report.tables import table
from iec_eval.report.verdicts import row_verdicts, verdicts
from iec_eval.report.wording import (
    decimals,
    higher_is_better,
    quantity,
    reading_note,
    significant,
    with_interval,
)
from iec_eval.results import (
    Comparison,
    Cost,
    Measurement,
    Results,
    Variant,
    read_results,
    with_deltas,
    with_relative_costs,
)
from iec_eval.study import Lack, Relation

PUBLISHED = Path(__file__).parents[1] / "docs" / "results"
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


def against(versus: str, relation: Relation, value: float, **more: Any) -> Comparison:
    """A comparison whose interval reaches 0.25 to either side."""
    low, high = value - 0.25, value + 0.25
    found: dict[str, Any] = {"metric": "fid-fashion", "ci95": (low, high), **more}
    word = "not distinguishable" if low <= 0 <= high else "better" if value < 0 else "worse"
    return Comparison(**{"judgement": word, **found}, versus=versus, relation=relation, value=value)


def toy(*rows: Variant, **more: Any) -> Results:
    parts: dict[str, Any] = {"study": "toy", "images": 1000, "protocol": {"id": "p1"}, **more}
    return with_relative_costs(with_deltas(Results(variants=list(rows), **parts)))


def small() -> Results:
    return toy(
        row("Full", 9.873, 2.46e8, control=True),
        row(
            "Cached",
            11.92,
            1.524e8,
            efficiency=CACHE,
            full=7,
            cached=13,
            judge_of={"Cached + IEC": "base"},
        ),
        row("Cached + IEC", 10.77, 2.385e8, efficiency=CACHE, callbacks=IEC, full=14, cached=13),
        controls=["full-precision"],
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
| variant      | fid-fashion (N=1000) ↓ |    vs base | vs equal cost | evaluations/image | \
MACs/image | relative MACs |  seconds/image | weights |
| ------------ | ---------------------: | ---------: | ------------: | ----------------: | \
---------: | ------------: | -------------: | ------: |
| Full         |                   9.87 |          - |             - |                20 | \
     246 M |         1.00x | 0.0246 (1.00x) | 1.83 MB |
| Cached       |                  11.92 |          - |             - |     7 + 13 cached | \
     152 M |         0.62x | 0.0152 (0.62x) | 1.83 MB |
| Cached + IEC |          10.77 (-1.15) | not judged |  controls off |    14 + 13 cached | \
     238 M |         0.97x | 0.0238 (0.97x) | 1.83 MB |

1,000 images per row. FID is biased upward below 50,000 images. No confidence intervals.

In parentheses after a metric: its change against another row (Cached + IEC against Cached).

Callbacks cost extra evaluations: compare rows at equal relative MACs.
"""

LATEX = "\n".join(
    [
        r"\begin{tabular}{lrrrrrrrr}",
        r"\toprule",
        r"variant & fid-fashion (N=1000) $\downarrow$ & vs base & vs equal cost & "
        r"evaluations/image & MACs/image & relative MACs & seconds/image & weights \\",
        r"\midrule",
        r"Full & 9.87 & - & - & 20 & 246 M & 1.00x & 0.0246 (1.00x) & 1.83 MB \\",
        r"Cached & 11.92 & - & - & 7 + 13 cached & 152 M & 0.62x & 0.0152 (0.62x) & 1.83 MB \\",
        r"Cached + IEC & 10.77 (-1.15) & not judged & controls off & 14 + 13 cached & 238 M & "
        r"0.97x & 0.0238 (0.97x) & 1.83 MB \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\par {\footnotesize 1,000 images per row. FID is biased upward below 50,000 images. "
        r"No confidence intervals.}",
        r"\par {\footnotesize In parentheses after a metric: its change against another row "
        r"(Cached + IEC against Cached).}",
        r"\par {\footnotesize Callbacks cost extra evaluations: compare rows at equal relative "
        r"MACs.}",
        "",
    ]
)

CSV = """\
study,variant,fingerprint,control,simulated,status,error,images,seeds,fid-fashion,\
fid-fashion_spread,fid-fashion_ci95_low,fid-fashion_ci95_high,fid-fashion_delta,\
fid-fashion_delta_versus,fid-fashion_delta_spread,fid-fashion_delta_ci95_low,\
fid-fashion_delta_ci95_high,versus_base,versus_base_metric,versus_base_difference,\
versus_base_ci95_low,versus_base_ci95_high,versus_base_level,versus_base_verdict,\
versus_equal_cost,\
versus_equal_cost_metric,versus_equal_cost_difference,versus_equal_cost_ci95_low,\
versus_equal_cost_ci95_high,versus_equal_cost_level,versus_equal_cost_verdict,evaluations_full,evaluations_cached,\
macs_per_image,relative_macs,bit_operations_per_image,relative_bit_operations,seconds_per_image,\
relative_seconds,weight_bytes
toy,A,ab,True,False,done,,1000,,2.0,,1.5,2.5,,,,,,,,,,,,,,,,,,,,20.0,0.0,200.0,1.0,,,2e-08,1.0,1834000
toy,B,ab,False,False,done,,1000,,1.5,,,,-0.5,A,,,,A,fid-fashion,-0.5,-0.75,-0.25,0.95,better,,,,,,,\
controls off,40.0,0.0,400.0,2.0,,,4e-08,2.0,1834000
"""


def test_markdown_whole() -> None:
    assert table([small()], "md") == MARKDOWN


def test_latex_whole() -> None:
    assert table([small()], "latex") == LATEX


def test_csv_whole_and_json_alike() -> None:
    results = toy(
        row("A", 2.0, 200.0, control=True, ci95=(1.5, 2.5), judge_of={"B": "base"}),
        row(
            "B",
            1.5,
            400.0,
            callbacks=IEC,
            full=40,
            comparisons=[against("A", "base", -0.5, level=0.95)],
        ),
        controls=["full-precision"],
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
    page = report_page(doubtful(), [], {})
    assert '>fid 4.32</span><span class="sub">doubtful</span>' in page
    assert 'title="the table has &lt;two&gt; headings"' in page
    assert "(doubtful), A, B: the table has &lt;two&gt; headings" in page
    assert "&#34;doubt&#34;: &#34;not printed&#34;" in page


def test_doubts_are_columns_of_their_own_where_there_are_any() -> None:
    reasons = [record["doubt"] for record in json.loads(table([doubtful()], "json"))]
    assert reasons == [None, *["the table has <two> headings"] * 2, "not printed", None]
    assert "doubt" not in json.loads(table([small()], "json"))[0]
    assert table([doubtful()], "csv").splitlines()[0].endswith(",paper_fid,paper_is,doubt")


def test_intervals_are_shown_and_end_the_warning() -> None:
    text = table([toy(row("A", 2.0, 200.0, ci95=(1.5, 2.5)), images=50_000)], "md")
    assert re.search(r"\| A +\| +2.00 \[1.50, 2.50\] \|", text)
    wanted = (
        "50,000 images per row. In brackets: 95 % confidence intervals, of noise and not of bias."
    )
    assert text.endswith(f"\n\n{wanted}\n")


def test_the_note_says_which_metrics_have_no_interval() -> None:
    given = row("A", 2.0, 200.0, ci95=(1.5, 2.5))
    more = {"median": Measurement(value=1.0), "is-std": Measurement(value=1.0)}
    both = given.model_copy(update={"metrics": {**given.metrics, **more}})
    assert "95 % confidence intervals (none for median), of noise" in reading_note([toy(both)])
    infinite = {"fid-infinity-fashion": Measurement(value=1.0, ci95=(0.0, 2.0))}
    both = given.model_copy(update={"metrics": {**given.metrics, **infinite}})
    assert "below 50,000 images (fid-infinity-fashion is it without that bias). In" in reading_note(
        [toy(both)]
    )


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
    both: list[dict[str, bool]] = [{"other": up, "fid": up} for up in (True, False)]
    told = [toy().model_copy(update={"directions": one}) for one in both]
    assert [higher_is_better("other", one) for one in told] == [True, False]
    assert [higher_is_better("fid", one, toy()) for one in told] == [True, False]
    assert higher_is_better("fid", *told) is None  # they contradict each other
    upward = small().model_copy(update={"directions": {"fid-fashion": True}})
    assert "fid-fashion (N=1000) ↑" in table([upward], "md")


def test_numbers_are_worded_to_be_read() -> None:
    assert [quantity(n) for n in (0, 5, 999.4, 999.9, 1.5e9, 2e16)] == [
        "0", "5.00", "999", "1.00 k", "1.50 G", "20.0 P",
    ]  # fmt: skip
    assert [significant(n) for n in (1234.5, 99.99, 99.9, 0.01234)] == [
        "1234", "100", "99.9", "0.0123",
    ]  # fmt: skip
    assert [decimals([n]) for n in (0.0, 0.0012, 1.5, 12.0, 150.0, 99999.0)] == [2, 6, 3, 2, 1, 0]


def corrected(*comparisons: tuple[str, str, float, Any, Any], **more: Any) -> Variant:
    """A row with a callback, compared with others: (versus, relation, value, ci95, judgement)."""
    found = [
        Comparison(
            versus=versus, relation=relation, metric="fid-fashion", value=value, ci95=ci95,
            judgement=judgement,
        )
        for versus, relation, value, ci95, judgement in comparisons
    ]  # fmt: skip
    more = {"efficiency": CACHE, "callbacks": IEC, **more}
    return row("C", 8.5, 200.0, comparisons=found, **more)


def plain() -> list[Variant]:
    names = {"full": 7.0, "P": 10.0, "Q": 8.4, "R": 9.0, "S": 8.6}
    rows = [row(name, fid, 100.0 * (1 + (name != "full"))) for name, fid in names.items()]
    return [rows[0].model_copy(update={"control": True}), *rows[1:]]


def test_a_verdict_is_about_the_base_and_the_strongest_equal_cost_rival() -> None:
    found = corrected(
        ("P", "base", -1.5, (-2.0, -1.0), "better"),
        ("R", "equal-cost", -0.5, (-0.9, -0.1), "better"),
        ("Q", "equal-cost", 0.1, (-0.3, 0.5), "not distinguishable"),
        ("S", "zero-cost", 0.2, (0.1, 0.3), "worse"),
        ("full", "full-precision", 1.5, (1.2, 1.8), "worse"),
    )
    assert verdicts(toy(*plain(), found)) == [
        "C (fid-fashion 8.500 at 2.00x MACs): better than its base P (fid-fashion 10.00 at 2.00x "
        "MACs) by 1.50 [1.00, 2.00]; not distinguishable from its strongest equal-cost rival Q "
        "(fid-fashion 8.400 at 2.00x MACs) (+0.10 [-0.30, +0.50]); worse than the best callback "
        "without extra evaluations S (fid-fashion 8.600 at 2.00x MACs) by 0.20 [0.10, 0.30]; worse "
        "than the reference full (fid-fashion 7.000 at 1.00x MACs) by 1.50 [1.20, 1.80]."
    ]
    assert list(row_verdicts(toy(*plain(), found))) == ["C"]


def test_a_collapsed_row_takes_no_digits_from_the_verdicts_on_others() -> None:
    found = corrected(("P", "base", -0.02, (-0.03, -0.01), "better"))
    collapsed = row("collapsed", 320.0, 200.0)
    (said,) = verdicts(toy(*plain(), collapsed, found))
    assert "by 0.020 [0.010, 0.030]" in said


@pytest.mark.parametrize(
    ("macs", "said"),
    [
        (200.0, ""), (196.0, ""), (220.0, ""),
        (190.0, ", which took 0.95 times the work"), (320.0, ", which took 1.6 times the work"),
    ],
)  # fmt: skip
def test_a_rival_that_did_other_work_after_all_says_so(macs: float, said: str) -> None:
    """As where corrections stopped earlier than it was counted on."""
    found = corrected(("R", "equal-cost", 0.5, (0.1, 0.9), "worse"))
    study = toy(*plain()[:-2], row("R", 8.0, macs), found, controls=["equal-cost"])
    (verdict,) = verdicts(study)
    assert f"rival R (fid-fashion 8.000 at {macs / 100:.2f}x MACs){said} by 0.50" in verdict
    assert f"against R{said}." in table([study], "md")
    assert f"R{said}" in report_page(study, [], {})


def test_a_verdict_without_controls_says_so() -> None:
    (found,) = verdicts(toy(*plain(), corrected(("P", "base", -1.5, None, None))))
    assert found.endswith(
        "without an interval, against its base P (fid-fashion 10.00 at 2.00x MACs) (-1.50); no "
        "equal-cost rival: none could be compared in fid-fashion."
    )
    late = row("late", 9.0, 100.0).model_copy(
        update={"status": "partial", "judge_of": {"C": "equal-cost"}}
    )
    (waiting,) = verdicts(toy(*plain(), corrected(), late, controls=["equal-cost"]))
    assert "no equal-cost rival: none has finished; not held against late (partial)" in waiting
    (off,) = verdicts(toy(*plain(), corrected(), controls=[]))
    assert off.endswith("no equal-cost rival: controls are off.")
    (free,) = verdicts(toy(*plain(), corrected(), controls=["equal-cost"]))
    assert free.endswith("no equal-cost rival: the base costs as much, or less than 2 % less.")
    steps = Lack(relation="equal-cost", what="equal-cost rival more steps", reason="no")
    shift = Lack(relation="zero-cost", what="zero-cost rival time shift", reason="no")
    (lacking,) = verdicts(toy(*plain(), corrected(lacks=[steps]), controls=["equal-cost"]))
    assert lacking.endswith(
        "no equal-cost rival: none could be had; not held against equal-cost rival more steps "
        "(not to be had)."
    )
    (free,) = verdicts(toy(*plain(), corrected(lacks=[shift]), controls=["equal-cost"]))
    assert "the base costs as much, or less than 2 % less; not held against zero-cost rival" in free


def test_where_higher_is_better_the_strongest_rival_is_the_highest() -> None:
    def compared(versus: str, value: float) -> Comparison:
        return Comparison(
            versus=versus, relation="equal-cost", metric="is", value=value, ci95=(value, value),
            judgement="better" if value > 0 else "worse",
        )  # fmt: skip

    rows = [one.model_copy(update={"metrics": {"is": Measurement(value=5.0)}}) for one in plain()]
    judged = corrected().model_copy(
        update={
            "metrics": {"is": Measurement(value=5.5)},
            "comparisons": [compared("P", 0.5), compared("Q", -0.2)],
        }
    )
    (found,) = verdicts(toy(*rows, judged))
    assert "worse than its strongest equal-cost rival Q (is 5.000" in found
    assert "by 0.200 [0.200, 0.200]" in found


def test_rivals_and_halves_get_no_verdict_and_stacked_rows_do() -> None:
    base = ("P", "base", -1.5, (-2.0, -1.0), "better")
    for relation in ("equal-cost", "zero-cost", "half"):
        judge = corrected(base, judge_of={"X": relation}, control=True)
        assert verdicts(toy(*plain(), judge)) == []
        own = judge.model_copy(update={"control": False})  # the study asks for it
        assert len(verdicts(toy(*plain(), own))) == 1
    assert len(verdicts(toy(*plain(), corrected(base, judge_of={"X": "full-precision"})))) == 1
    stacked = corrected(("P", "stacking", -1.5, (-2.0, -1.0), "better"), callbacks=[])
    (found,) = verdicts(toy(*plain(), stacked))
    assert found.endswith(
        "better than its parts stacked P (fid-fashion 10.00 at 2.00x MACs) by 1.50 [1.00, 2.00]."
    )
    assert verdicts(toy(*plain(), corrected(base, callbacks=[]))) == []


def test_no_verdict_without_a_direction_or_from_unfinished_rows() -> None:
    unclear = row("C", 1.0, 1.0, callbacks=IEC)
    other = unclear.model_copy(update={"metrics": {"other": Measurement(value=1.0)}})
    assert verdicts(toy(other)) == []
    clear = toy(other).model_copy(update={"directions": {"other": True}})
    assert len(verdicts(clear)) == 1
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


def test_a_plot_has_no_more_digits_than_can_be_seen() -> None:
    svg = quality_plot(small())
    assert svg is not None
    drawn = re.findall(r' (?:d|x|y)="([^"]*)"', svg)
    assert drawn
    assert not re.findall(r"\d\.\d\d", " ".join(drawn))
    assert "\n " not in svg


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


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.json")), ids=lambda path: path.stem)
def test_no_label_of_a_published_study_is_cut_off(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "figure_as_svg", lambda figure: figures.append(figure) or "<svg>")
    assert quality_plot(read_results(path)) == "<svg>"
    axes = figures[0].axes[0]
    frame = axes.get_window_extent()
    placed = [(text.get_text(), text.get_window_extent()) for text in axes.texts]
    cut = [name for name, box in placed if name and (box.x1 > frame.x1 or box.x0 < frame.x0)]
    assert cut == []


def test_points_have_numbers_where_names_find_no_room() -> None:
    def texts(name: str) -> set[str]:
        crowd = [row(f"{name} {n}", 9.0 + n / 1000, 100.0) for n in range(6)]
        svg = quality_plot(toy(*crowd, row("far away", 20.0, 200.0)))
        assert svg is not None
        assert f"<title>2. {name} 1: " in svg  # hovering tells the name
        return set(re.findall(r">([^<>\n]+)</text>", svg))

    short, long = texts("W"), texts("a name that is as long as the plot is wide, or nearly")
    assert {"W 0", "W 5", "far away"} <= short
    assert {str(number) for number in range(1, 8)} <= long
    assert not any("name" in text for text in long)


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
        self.script = ""
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
        if self.open[-1:] == ["script"]:
            self.script += data
        else:
            self.text.append(data)


def whole_page(results: Results | None = None) -> str:
    manifest = {"config": {"note": "</pre><script>alert(1)</script>"}, "path": Path("x")}
    return report_page(results or uneven(), [(NASTY, pictures(2))], manifest)


def test_the_page_is_well_formed_and_says_everything() -> None:
    page = Page(whole_page(small()))
    text = "".join(page.text)
    for wanted in ("Full", "Cached + IEC", "10.77", "0.97x", "controls off", "equal relative MACs"):
        assert wanted in text
    assert "1,000 images per row. FID is biased upward below 50,000 images" in text
    assert page.tags.count("details") == 3
    assert page.tags.count("svg") == 1


def test_the_page_escapes_every_name() -> None:
    results = uneven()
    text = whole_page(results.model_copy(update={"study": "<i>study</i>"}))
    page = Page(text)
    assert not {"b", "i"} & set(page.tags)
    assert page.tags.count("script") == 1
    assert NASTY in "".join(page.text)
    assert "no <memory>\nleft" in page.text
    assert "<i>study</i>" in page.text


def test_the_page_needs_nothing_else_and_runs_only_its_own_script() -> None:
    text = whole_page()
    links = re.findall(r'(\S*?)="?(?:https?:)?//', text)
    assert all(link.startswith("xmlns") for link in links if link)
    assert not re.search(r"@import|<script [^>]|<link|url\((?!#)", text)
    page = Page(text)
    loaded = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/", "#")) for value in loaded)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    (policy,) = [value for name, value in page.attributes if "default-src" in value]
    own = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'",
        f"script-src 'sha256-{own}'", "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip


def test_the_page_leaves_out_what_there_is_not() -> None:
    page = Page(report_page(toy(), [], {}))
    assert "img" not in page.tags
    assert "svg" not in page.tags
    assert "button" not in page.tags
    assert not {"At equal cost", "Step by step"} & set(page.text)


def test_write_report_writes_the_files_whole(tmp_path: Path) -> None:
    rows = [("Full", pictures(9)), ("Cached", pictures(9))]
    written = write_report(tmp_path / "out", small(), rows, {"git": "abc"}, columns=3)
    names = ["table.md", "gallery.png", "gallery-difference.png", "report.html"]
    assert [path.name for path in written] == names
    assert sorted(tmp_path.glob("out/*")) == sorted(written)
    assert written[0].read_text(encoding="utf-8") == MARKDOWN
    with Image.open(written[1]) as picture:
        assert torch.equal(shown(picture, (1, 2), 16, 4), rows[1][1][2].expand(3, -1, -1))


def test_write_report_without_images_makes_no_gallery(tmp_path: Path) -> None:
    written = write_report(tmp_path, small(), [], {})
    assert [path.name for path in written] == ["table.md", "report.html"]


def test_pictures_that_there_is_nothing_for_any_more_are_deleted(tmp_path: Path) -> None:
    rows = [("Full", pictures(9)), ("Cached", pictures(9))]
    write_report(tmp_path, small(), rows, {})
    assert (tmp_path / "gallery-difference.png").exists()
    write_report(tmp_path, small(), [], {})  # the same rows, whose images cannot be read now
    assert (tmp_path / "gallery-difference.png").exists()
    write_report(tmp_path, small(), rows[1:], {}, scored=True)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["gallery.png"]
    write_report(tmp_path, small(), [], {}, scored=True)
    assert not [*tmp_path.glob("*.png")]


# --- strips and differences --------------------------------------------------------------------


def decoded(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_a_strip_holds_the_images_and_the_amplified_differences() -> None:
    base = torch.full((3, 1, 8, 8), 100, dtype=torch.uint8)
    other = base.clone()
    other[1, 0, 2, 3], other[2, 0, 5, 5] = 103, 90
    made = filmstrips([("base", base), ("other", other)], "base", columns=3)
    assert made is not None
    assert [strip.difference is None for strip in made.strips] == [True, False]
    assert made.factor == 32  # nearly all pixels agree: as much as there is
    strip, difference = decoded(made.strips[1].images), decoded(made.strips[1].difference or "")
    assert strip.size == difference.size == (3 * 8 + 2, 8)
    second, third = (9 + 3, 2), (18 + 5, 5)
    assert [strip.getpixel(at)[0] for at in (second, third, (0, 0))] == [103, 90, 100]
    assert [difference.getpixel(at)[0] for at in (second, third, (0, 0))] == [224, 0, 128]
    assert strip.getpixel((8, 0))[3] == 0  # gaps are transparent


def test_the_amplification_leaves_most_differences_unclipped() -> None:
    base = torch.full((1, 1, 10, 10), 100, dtype=torch.uint8)
    for size, factor in ((0, 32), (3, 32), (4, 16), (7, 16), (15, 8), (31, 4), (63, 2), (64, 1)):
        _, found = differences([("base", base), ("other", base + size)], "base")
        assert found == factor, size


def test_only_finished_rows_have_a_difference() -> None:
    results = toy(
        row("Full", 1.0, 1e8),
        row("A", 2.0, 1e8, efficiency=CACHE),
        row("B", 2.0, 1e8, efficiency=CACHE, status="partial"),
    )
    rows = [(name, pictures(2)) for name in ("Full", "A", "B")]
    text = report_page(results, rows, {})
    assert re.findall(r'alt="([^"]*) minus Full"', text) == ["A"]
    broken = results.model_copy(
        update={"variants": [row("Full", 1.0, 1e8, status="partial"), *results.variants[1:]]}
    )
    assert " minus Full" not in report_page(broken, rows, {})


def test_strips_stay_within_their_budget() -> None:
    """Noise, the worst there is to compress, of forty rows of large colour images."""
    noise = torch.randint(0, 256, (4, 3, 256, 256), dtype=torch.uint8)
    rows = [(f"row {n}", noise.roll(n, -1)) for n in range(40)]
    made = filmstrips(rows, "row 0", columns=4, budget=900_000)
    assert made is not None
    data = [a for s in made.strips for a in (s.images, s.difference) if a is not None]
    assert len(data) == 79
    assert sum(map(len, data)) < 900_000 * 4 / 3 + 79 * 30
    assert made.shrunk in (48, 64, 96, 128)
    assert made.height == made.shrunk


def test_pictures_of_an_analysis_come_in_unless_they_are_large(tmp_path: Path) -> None:
    folder = tmp_path / "analysis" / "W8A8"
    folder.mkdir(parents=True)
    (folder / "error_growth.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "spectral.png").write_bytes(b"\x89PNG")
    (folder / "large.svg").write_bytes(b" " * (LARGEST + 1))
    (folder / "notes.json").write_text("{}")
    found = figures(tmp_path / "analysis")
    shown = [(one.group, one.title, one.data is not None) for one in found]
    assert shown == [
        ("W8A8", "error growth", True), ("W8A8", "large", False), ("W8A8", "spectral", True)
    ]  # fmt: skip
    text = report_page(small(), [], {}, analysis=found)
    assert Page(text).tags.count("figcaption") == 2
    assert "analysis/W8A8/large.svg is not shown, to keep this page small" in text
    run = tmp_path / "analysis" / "ablation"  # a run of its own, whose pictures are its report's
    run.mkdir()
    (run / "gallery.png").write_bytes(b"\x89PNG")
    assert len(figures(tmp_path / "analysis")) == 4
    (run / "study.yaml").write_text("study: ablation")
    assert figures(tmp_path / "analysis") == found
    assert figures(tmp_path / "nothing") == []


def test_pictures_of_rows_that_are_no_longer_there_stay_out(tmp_path: Path) -> None:
    """Their folders end in the first digits of a fingerprint; others are nobody's row."""
    rows = ("w8a8-0123abcd", "w8a8-4567abcd", "mixed-4567abcd", "before-it-was-renamed-0123abcd")
    for name in (*rows, "mine", "notes-20261127"):
        (tmp_path / "analysis" / name).mkdir(parents=True)
        (tmp_path / "analysis" / name / "growth.svg").write_text("<svg/>")
        if name in rows:
            (tmp_path / "analysis" / name / "growth.json").write_text("{}")
    write_report(tmp_path, small(), [], {}, current={"0123abcd", "mixed"})
    page = (tmp_path / "report.html").read_text()
    assert "w8a8-4567abcd" not in page
    for name in {*rows, "mine", "notes-20261127"} - {"w8a8-4567abcd"}:
        assert name in page


# --- digits, front, LaTeX ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bounds", "text"),
    [
        (12.3456, (11.2, 13.5), "12.3 [11.2, 13.5]"),
        (12.3456, (12.22, 12.47), "12.35 [12.22, 12.47]"),
        (0.0123456, (0.01231, 0.01237), "0.012346 [0.012310, 0.012370]"),
        (1234.5, (1000.0, 1500.0), "1234 [1000, 1500]"),
        (1.5, None, "1.500"),
        (1.5, (1.5, 1.5), "1.500 [1.500, 1.500]"),
    ],
)
def test_digits_end_where_the_interval_says_they_mean_nothing(
    value: float, bounds: tuple[float, float] | None, text: str
) -> None:
    assert with_interval(value, bounds, 3) == text


def test_the_front_is_what_nothing_cheaper_beats() -> None:
    study = large_study()
    done = [r for r in study.variants if r.status == "done"]
    places = {r.name: (r.cost.relative_macs or 0, r.metrics["fid-fashion"].value) for r in done}
    beaten = {
        name
        for name, (cost, fid) in places.items()
        for other, (least, best) in places.items()
        if other != name and least <= cost and best <= fid and (least, best) != (cost, fid)
    }
    assert {point.name for point in front_of(study)} == places.keys() - beaten
    upward = study.model_copy(update={"directions": {"fid-fashion": True}})
    assert front_of(upward) != front_of(study)


def test_the_plot_has_a_title_bar_and_shape_for_every_finished_row() -> None:
    study = large_study()
    svg = quality_plot(study)
    assert svg is not None
    titles = re.findall(r'<g id="row-(\d+)">\s*<title>(.*?)</title>', svg)
    finished = [n for n, r in enumerate(study.variants, 1) if r.status == "done"]
    assert [int(number) for number, _ in titles] == finished
    assert titles[2][1] == "3. DeepCache N=5 + IEC: fid-fashion 0.386 [0.328, 0.444] at 0.65x MACs"
    assert 'id="pareto-front"' in svg
    assert "mathdefault" not in svg


class Tabular:
    """A LaTeX ``tabular`` read by its structure; fails on what LaTeX would stumble over."""

    def __init__(self, text: str) -> None:
        found = re.fullmatch(
            r"\\begin\{tabular\}\{([lr]+)\}\n\\toprule\n(.*) \\\\\n\\midrule\n(.*)\\bottomrule\n"
            r"\\end\{tabular\}\n((?:\\par \{\\footnotesize .*\}\n)*)",
            text,
            re.DOTALL,
        )
        assert found is not None
        self.alignment, head, body, self.notes = found.groups()
        lines = [head, *(line.removesuffix(" " + 2 * "\\") for line in body.splitlines())]
        self.cells = [re.split(r"(?<!\\) & ", line) for line in lines]
        bare = re.sub(
            r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater)\{\}", "", text
        )
        bare = re.sub(r"\\[&%$#_{}]|\$\\(up|down)arrow\$", "", bare)
        assert bare.count("{") == bare.count("}")
        assert not re.search(r"[%$#_^~]", bare)


def test_latex_has_verdicts_and_intervals_in_a_sound_tabular() -> None:
    study = large_study()
    read = Tabular(table([study], "latex"))
    assert {len(line) for line in read.cells} == {len(read.alignment)}
    assert len(read.cells) == 1 + len(study.variants)
    head, *rows = read.cells
    base, rival = head.index("vs base"), head.index("vs equal cost")
    iec = next(line for line in rows if line[0] == "DeepCache N=5 + IEC")
    assert iec[1] == "0.386 {[}0.328, 0.444] (+0.076 {[}+0.018, +0.134])"
    assert iec[base] == "worse (+0.076 {[}+0.046, +0.106])"
    assert iec[rival] == "worse (+0.138 {[}+0.108, +0.168])"
    assert (
        r"\par {\footnotesize vs equal cost: DeepCache N=5 + IEC against DeepCache N=5, equal"
        in (read.notes)
    )


# --- verdict columns ---------------------------------------------------------------------------


def verdict_of(
    one: Variant, against: Against, *others: Variant, controls: list[str] | None = None
) -> Judged:
    return judged(one, against, toy(one, *others, controls=controls))


def test_the_strongest_rival_is_the_best_one() -> None:
    rivals = [row(name, 1.0, 1e8, efficiency=CACHE) for name in ("weak", "strong")]
    one = row(
        "C", 2.0, 2e8, callbacks=IEC, efficiency=CACHE,
        comparisons=[against("weak", "equal-cost", -1.0), against("strong", "equal-cost", 0.5)],
    )  # fmt: skip
    found = verdict_of(one, "equal-cost", *rivals)
    assert found.comparison is not None
    assert (found.comparison.versus, found.word) == ("strong", "worse")
    rising = toy(one, *rivals).model_copy(update={"directions": {"fid-fashion": True}})
    upward = judged(one, "equal-cost", rising)
    assert upward.comparison is not None
    assert upward.comparison.versus == "weak"


@pytest.mark.parametrize("status", ["partial", "failed"])
def test_an_unfinished_row_is_in_no_verdict_on_either_side(status: str) -> None:
    ended = {"status": status, "error": "power cut"}
    comparison = [against("base", "base", -1.0)]
    one = row("C", 2.0, 2e8, callbacks=IEC, comparisons=comparison)
    base = row("base", 3.0, 1e8, judge_of={"C": "base"})
    assert verdict_of(one, "base", base).word == "better"
    broken = verdict_of(one.model_copy(update=ended), "base", base)
    assert (broken.comparison, broken.word) == (None, status)
    broken = verdict_of(one, "base", base.model_copy(update=ended))
    assert (broken.comparison, broken.word) == (None, "base not finished")
    study = toy(one, base.model_copy(update=ended))
    assert comparisons(study.variants[0], study) == []
    assert 'id="compared"' not in report_page(study, [], {})


def test_the_column_says_why_there_is_no_rival() -> None:
    """``judge_of`` stands in the rival: it names the rows that are compared with it."""
    one = row("C", 2.0, 2e8, callbacks=IEC)
    rival = row("R", 1.0, 2e8, judge_of={"C": "equal-cost"})

    def word(tried: Variant, *others: Variant, controls: list[str] | None) -> str:
        return judged(tried, "equal-cost", toy(tried, *others, controls=controls)).word

    assert word(one, controls=[]) == word(one, controls=["full-precision"]) == "controls off"
    assert word(one, rival, controls=["equal-cost"]) == "not judged"
    broken = rival.model_copy(update={"status": "failed", "error": "power cut"})
    assert word(one, broken, controls=["equal-cost"]) == "rivals not finished"
    second = rival.model_copy(update={"name": "second"})
    assert word(one, broken, second, controls=["equal-cost"]) == "not judged"
    assert word(one, controls=["equal-cost"]) == "base costs as much"
    steps = Lack(relation="equal-cost", what="equal-cost rival more steps", reason="too few")
    lacking = one.model_copy(update={"lacks": [steps]})
    assert word(lacking, controls=["equal-cost"]) == "none to be had"
    shift = Lack(relation="zero-cost", what="zero-cost rival time shift", reason="too few")
    other = one.model_copy(update={"lacks": [shift]})
    assert word(other, controls=["equal-cost"]) == "base costs as much"
    assert verdict_of(one, "base", controls=[]).word == "controls off"
    assert word(one, controls=None) == "not judged"  # files that do not say


def test_a_rival_that_is_missing_is_named_wherever_the_verdict_is() -> None:
    """Else the row would seem to have won against it."""
    lacks = [
        Lack(relation="equal-cost", what="equal-cost rival smaller interval", reason="no below 2"),
        Lack(relation="stacking", what="naive stacking", reason="which is no rival"),
    ]
    compared = [against("weak", "equal-cost", -1.0)]
    one = row("C", 2.0, 2e8, callbacks=IEC, comparisons=compared, lacks=lacks)
    weak = row("weak", 3.0, 2e8, judge_of={"C": "equal-cost"}, control=True)
    strong = row("strong", 1.0, 2e8, judge_of={"C": "equal-cost"}, control=True)
    missing = "equal-cost rival smaller interval (not to be had)"
    study = toy(one, weak, strong)
    assert absent(one, study) == [missing]
    ended = {"status": "failed", "error": "power cut", "metrics": {}}
    study = toy(one, weak, strong.model_copy(update=ended))
    assert absent(one, study) == ["strong (failed)", missing]
    said = f"C is not held against strong (failed), {missing}. {lacks[0]}."
    assert said in table([study], "md")
    assert "naive stacking" not in table([study], "md")
    assert said in html.unescape(report_page(study, [], {}))
    (found,) = verdicts(study)
    assert found.endswith(f"; not held against strong (failed), {missing}.")
    assert absent(weak, study) == []


@pytest.mark.parametrize("against", ["base", "equal-cost"])
def test_a_row_that_others_are_held_against_is_not_on_trial(against: Against) -> None:
    one = row("C", 2.0, 2e8, callbacks=IEC)
    for other in (
        row("plain", 1.0, 1e8),
        row("base", 1.0, 1e8, judge_of={"C": "base"}),
        row("steps", 1.0, 2e8, control=True, judge_of={"C": "equal-cost"}),
        row("Heun", 1.0, 2e8, callbacks=IEC, control=True, judge_of={"C": "equal-cost"}),
    ):
        assert verdict_of(other, against, one).word == ""
    assert verdict_of(one.model_copy(update={"control": True}), against).word == "not judged"
