"""Label and prompt lists: functions of the image index, bad files named with their line."""

from __future__ import annotations

from pathlib import Path

import pytest

from iec_eval.errors import ConfigError
from iec_eval.models.lists import LabelList, read_labels, read_prompts, spread


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- labels -----------------------------------------------------------------------------------


def test_a_label_list_is_its_lines_written_out(tmp_path: Path) -> None:
    found = read_labels(written(tmp_path, "# class count\n3 2\n\n0 1\n3 1\n"), 4)
    assert len(found) == 4
    assert [found[image] for image in range(9)] == [3, 3, 0, 3, 3, 3, 0, 3, 3]


def test_fifty_of_each_class_are_class_major() -> None:
    found = LabelList(range(1000), [50] * 1000)
    assert len(found) == 50_000
    assert [found[image] for image in range(50_000)] == [image // 50 for image in range(50_000)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 50\n1\n", "line 2: wanted CLASS COUNT, such as '7 50', got '1'"),
        ("0 50 2\n", "line 1: wanted CLASS COUNT"),
        ("0 50\n\n# note\ncat 50\n", "line 4: wanted CLASS COUNT, .* got 'cat 50'"),
        ("-1 50\n", "line 1: wanted CLASS COUNT"),
        ("0 1.5\n", "line 1: wanted CLASS COUNT"),
        ("3 50\n4 50\n", "line 2: class 4, the model has 0 to 3"),
        ("3 0\n", "line 1: wanted 1 image or more, got 0"),
        ("# nothing\n\n", "no line with a class"),
        ("", "no line with a class"),
        (b"0 50\n1 \xff\n", "line 2: not UTF-8"),
    ],
)
def test_a_bad_label_file_is_named_with_its_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_labels(path, 4)
    assert str(path) in str(caught.value)


# --- prompts ----------------------------------------------------------------------------------


def test_prompts_are_the_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "a cat\n# not a comment\n  a naïve dog \r\n")
    assert read_prompts(path) == ["a cat", "# not a comment", "a naïve dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat\n\na dog\n", "line 2: is empty"),
        ("a cat\n   \n", "line 2: is empty"),
        ("", "no line; wanted one prompt on every line"),
        (b"a cat\na d\xf6g\n", "line 2: not UTF-8"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"labels .*none\.txt: no such file"):
        read_labels(tmp_path / "none.txt", 4)
    with pytest.raises(ConfigError, match=r"prompts .*none\.txt: no such file"):
        read_prompts(tmp_path / "none.txt")


# --- what calibration sees --------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 3, 1000, 50_000])
@pytest.mark.parametrize("count", [1, 8, 64, 500])
def test_calibration_images_sample_a_list_evenly(total: int, count: int) -> None:
    """Every tenth of the list gets its share, give or take two."""
    found = spread(range(count), total)
    assert all(0 <= position < total for position in found)
    if total >= 1000:
        for tenth in range(10):
            inside = sum(tenth * total <= 10 * position < (tenth + 1) * total for position in found)
            assert abs(inside - count / 10) <= 2


def test_a_calibration_image_has_its_place_whatever_the_batch() -> None:
    assert spread(range(64), 1000)[40:] == spread(range(40, 64), 1000)
