"""Files are written whole or not at all, read without running code, and cover every image once."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import random
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from iec_eval import processes, runs, storage
from iec_eval.errors import ConfigError, CorruptChunk, CorruptFile, MissingArtifact, StorageError
from iec_eval.runs import (
    Chunk,
    IndexRange,
    RunFolder,
    Spent,
    VariantFolder,
    covering,
    finished_ranges,
    missing_ranges,
)
from iec_eval.storage import (
    atomic_path,
    load_weights,
    read_tensors,
    write_tensors,
    write_text,
)


def refuse(number: int) -> Callable[..., None]:
    """A system call that fails with an error number."""

    def call(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


def chunk(start: int = 4, stop: int = 7) -> Chunk:
    pixels = torch.arange((stop - start) * 4, dtype=torch.uint8).reshape(-1, 1, 2, 2)
    return Chunk(IndexRange(start, stop), pixels, Spent(30, 12, 0.5))


# --- whole or not at all ----------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def write_half(interruption: type[BaseException]) -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise interruption

    for interruption in (KeyboardInterrupt, SystemExit, ValueError):
        with pytest.raises(interruption):
            write_half(interruption)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_is_one_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(storage.os, call, refuse(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"a\.txt: No space left on device.*free space.*again"):
        write_text(tmp_path / "a.txt", "text")
    with pytest.raises(StorageError, match=r"b\.safetensors: No space left on device"):
        write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["file", "file/deeper/still"])
def test_a_place_that_is_a_file_is_one_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'file'}: is a file, wanted a folder"):
        RunFolder(tmp_path / below).open()
    with pytest.raises(StorageError, match=f"cannot write {tmp_path / below}"):
        write_tensors(tmp_path / below / "a", {"x": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_opening_a_run_leaves_no_trace_and_bears_company(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "deep" / "run")
    run.open()
    assert not list(run.path.iterdir())
    unlink = Path.unlink

    def unlink_late(path: Path, missing_ok: bool = False) -> None:
        if path.name == ".writable":
            unlink(path)  # another process was faster
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_late)
    run.open()


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {"view": torch.arange(6).reshape(2, 3).T, "none": torch.zeros(0, dtype=torch.uint8)}
    about = {"text": "ä", "number": 0.1, "nothing": None, "list": [1, {"a": True}]}
    write_tensors(tmp_path / "t.safetensors", tensors, about)
    found, said = read_tensors(tmp_path / "t.safetensors")
    assert said == about
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


# --- chunks -----------------------------------------------------------------------------------


def test_a_chunk_comes_back_and_is_listed_without_opening(tmp_path: Path) -> None:
    folder, made = VariantFolder(tmp_path), chunk()
    folder.write_chunk(made)
    found = folder.read_chunk(made.range)
    assert torch.equal(found.images, made.images)
    assert {**vars(found), "images": None} == {**vars(made), "images": None}
    (folder.chunks / "000100-000199.safetensors").write_text("never opened")
    (folder.chunks / ".000007-000008.safetensors.m-1.x.tmp").write_text(
        "of a process that was killed"
    )
    (folder.chunks / "notes.safetensors").write_text("somebody's")
    assert folder.finished() == [made.range, IndexRange(100, 200)]


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def damage_emptied(path: Path) -> None:
    path.write_bytes(b"")


def damage_other_images(path: Path) -> None:
    tensors, about = read_tensors(path)
    write_tensors(path, {**tensors, "indices": tensors["indices"] + 1}, about)


def damage_no_images(path: Path) -> None:
    tensors, about = read_tensors(path)
    write_tensors(path, {"indices": tensors["indices"]}, about)


def damage_fewer_images(path: Path) -> None:
    tensors, about = read_tensors(path)
    write_tensors(path, {**tensors, "images": tensors["images"][1:]}, about)


def damage_other_metadata(path: Path) -> None:
    save_file(read_tensors(path)[0], path, {"seconds": "not JSON"})


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncated,
        damage_emptied,
        damage_other_images,
        damage_no_images,
        damage_fewer_images,
        damage_other_metadata,
    ],
)
def test_a_damaged_chunk_is_set_aside_and_missing(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = VariantFolder(tmp_path)
    for part in (chunk(0, 4), chunk(4, 8)):
        folder.write_chunk(part)
    path = folder.chunks / "000000-000003.safetensors"
    damage(path)
    damaged = path.read_bytes()
    with pytest.raises(CorruptChunk, match=rf"{re.escape(str(path))}.*set aside as .*\.corrupt"):
        folder.read_chunk(IndexRange(0, 4))
    assert path.with_suffix(".corrupt").read_bytes() == damaged
    assert folder.finished() == [IndexRange(4, 8)]
    assert missing_ranges(folder.finished(), 8, 4) == [IndexRange(0, 4)]
    assert folder.set_aside_corrupt() == []
    assert folder.read_chunk(IndexRange(4, 8)).range == IndexRange(4, 8)


@pytest.mark.parametrize("damage", [damage_truncated, damage_emptied])
def test_a_chunk_that_is_cut_off_is_set_aside_without_being_read(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = VariantFolder(tmp_path)
    for part in (chunk(0, 4), chunk(4, 8)):
        folder.write_chunk(part)
    path = folder.chunks / "000000-000003.safetensors"
    damage(path)
    (complaint,) = folder.set_aside_corrupt()
    assert complaint.startswith(str(path))
    assert complaint.endswith("set aside as 000000-000003.corrupt, to be made again")
    assert folder.finished() == [IndexRange(4, 8)]


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder, made = VariantFolder(tmp_path), chunk(0, 2)
    folder.write_chunk(made)
    path = folder.chunks / f"{made.range.stem}.safetensors"
    whole = path.read_bytes()
    kept = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = folder.read_chunk(made.range)
        except CorruptChunk:
            continue
        kept += 1  # spaces that fill up the header, say
        assert torch.equal(found.images, made.images)
        assert found.spent == made.spent
    assert kept < len(whole) // 10


def test_a_chunk_without_a_checksum_is_not_believed(tmp_path: Path) -> None:
    folder, made = VariantFolder(tmp_path), chunk()
    tensors = {"images": made.images, "indices": torch.tensor(made.range.indices)}
    path = folder.chunks / f"{made.range.stem}.safetensors"
    write_tensors(path, tensors, asdict(made.spent))
    with pytest.raises(CorruptChunk, match="has no checksum"):
        folder.read_chunk(made.range)


def test_two_processes_may_set_the_same_chunk_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = VariantFolder(tmp_path)
    folder.write_chunk(chunk())
    damage_truncated(folder.chunks / f"{chunk().range.stem}.safetensors")
    rename = Path.rename

    def rename_late(path: Path, target: Path) -> Path:
        rename(path, target)  # another process was faster
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    with pytest.raises(CorruptChunk):
        folder.read_chunk(chunk().range)
    assert folder.finished() == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_what_the_system_refuses_to_read_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run, folder, made = RunFolder(tmp_path / "run"), VariantFolder(tmp_path / "row"), chunk()
    folder.write_chunk(made)
    run.save("k" * 64, {"scale": torch.ones(3)}, {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse(number))
        for read in (
            lambda: folder.read_chunk(made.range),
            folder.set_aside_corrupt,
            lambda: run.load("k" * 64),
            lambda: run.has("k" * 64),
        ):
            with pytest.raises(StorageError, match=f"cannot read .*{os.strerror(number)}"):
                read()
    assert torch.equal(folder.read_chunk(made.range).images, made.images)
    assert run.has("k" * 64)


def test_a_file_that_was_made_again_meanwhile_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder, made = RunFolder(tmp_path / "run"), VariantFolder(tmp_path / "row"), chunk()
    folder.write_chunk(made)
    run.save("k" * 64, {"scale": torch.ones(3)}, {})

    def read_slowly(path: Path) -> Any:
        folder.write_chunk(made)
        run.save("k" * 64, {"scale": torch.ones(3)}, {})
        raise CorruptFile(f"{path}: was damaged when it was read")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "read_sealed", read_slowly)
        patch.setattr(runs, "read_tensors", read_slowly)
        with pytest.raises(CorruptChunk):
            folder.read_chunk(made.range)
        assert run.load("k" * 64) is None
    assert torch.equal(folder.read_chunk(made.range).images, made.images)
    assert run.has("k" * 64)


def test_asking_for_an_artifact_changes_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save("k" * 64, {"scale": torch.ones(3)}, {})
    (path,) = (tmp_path / "artifacts").glob("*.safetensors")
    damage_truncated(path)
    assert not run.has("k" * 64)
    assert path.exists()


def test_pieces_of_a_chunk_are_kept_until_it_is_whole(tmp_path: Path) -> None:
    folder, whole = VariantFolder(tmp_path), chunk(8, 16)
    pieces = [chunk(8, 11), chunk(11, 14), chunk(14, 16)]
    for piece in pieces[:2]:
        folder.write_part(piece)
    assert folder.finished() == []
    assert [piece.range for piece in folder.read_parts(whole.range)] == [
        IndexRange(8, 11),
        IndexRange(11, 14),
    ]
    assert folder.read_parts(IndexRange(0, 8)) == []
    joined = Chunk.joined([pieces[2], *folder.read_parts(whole.range)])
    assert (joined.range, joined.spent) == (whole.range, Spent(90, 36, 1.5))
    assert torch.equal(joined.images, torch.cat([piece.images for piece in pieces]))
    folder.write_chunk(joined)
    assert folder.read_parts(whole.range) == []
    assert folder.finished() == [whole.range]


def test_a_damaged_piece_is_made_again_and_overlapping_ones_are_read_once(tmp_path: Path) -> None:
    folder = VariantFolder(tmp_path)
    for piece in (chunk(0, 4), chunk(4, 8), chunk(6, 10)):
        folder.write_part(piece)
    damage_truncated(folder.parts / "000000-000003.safetensors")
    found = [piece.range for piece in folder.read_parts(IndexRange(0, 12))]
    assert found == [IndexRange(4, 8)]
    assert not (folder.parts / "000000-000003.safetensors").exists()


def test_tidying_removes_pieces_that_are_in_chunks_and_no_others(tmp_path: Path) -> None:
    folder = VariantFolder(tmp_path)
    folder.write_chunk(chunk(0, 4))
    folder.write_chunk(chunk(4, 8))
    for piece in (chunk(0, 2), chunk(3, 6), chunk(6, 9), chunk(12, 14)):
        folder.write_part(piece)
    folder.tidy()
    assert finished_ranges(folder.parts) == [IndexRange(6, 9), IndexRange(12, 14)]


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(
    tmp_path: Path,
) -> None:
    run, killed = RunFolder(tmp_path), subprocess.Popen(["true"])
    killed.wait()
    machine = processes.tag().rpartition("-")[0]
    names = {
        "of one that was killed": f".a.{machine}-{killed.pid}.x1.tmp",
        "ours": f".b.{processes.tag()}.x2.tmp",
        "another machine's": ".c.0123abcd-1.x3.tmp",
        "another machine's of last week": ".d.0123abcd-1.x4.tmp",
    }
    (tmp_path / "deep").mkdir()
    files = {what: tmp_path / "deep" / name for what, name in names.items()}
    for path in files.values():
        path.touch()
    os.utime(files["another machine's of last week"], (0, time.time() - 7 * 86400))
    run.tidy()
    left = {what for what, path in files.items() if path.exists()}
    assert left == {"ours", "another machine's"}


def test_file_names_state_ranges_of_any_size() -> None:
    for part in (IndexRange(0, 1), IndexRange(256, 512), IndexRange(999_990, 2_000_000)):
        assert IndexRange.parse(part.stem) == part
    for name in ("000000", "0-1", "a00000-000001", "000000-000001.x", "-000001", "000000-000001\n"):
        assert IndexRange.parse(name) is None


def test_variants_get_folders_that_cannot_collide_or_escape() -> None:
    run = RunFolder(Path("out"))
    assert run.variant("W8A8 + IEC", "0123456789").path == Path("out/w8a8-iec-01234567")
    assert run.variant("../../etc", "0123456789").path == Path("out/etc-01234567")
    assert run.variant("++", "0123456789").path == Path("out/variant-01234567")


# --- which images are missing, against brute force ---------------------------------------------


def draw_ranges(rng: random.Random) -> list[IndexRange]:
    """Some ranges below 40, overlapping or not, in any order."""
    cuts = [sorted(rng.sample(range(40), 2)) for _ in range(rng.randrange(6))]
    return [IndexRange(start, stop) for start, stop in cuts]


def covered(ranges: list[IndexRange], count: int) -> set[int]:
    return {index for part in ranges for index in part.indices if index < count}


@pytest.fixture(params=range(10))
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.param)


def test_missing_is_what_no_file_has_cut_at_chunk_edges(rng: random.Random) -> None:
    for _ in range(100):
        ranges, count, size = draw_ranges(rng), rng.randint(1, 45), rng.randint(1, 12)
        missing = missing_ranges(ranges, count, size)
        listed = [index for part in missing for index in part.indices]
        assert listed == sorted(set(range(count)) - covered(ranges, count))
        assert all(part.start // size == (part.stop - 1) // size for part in missing)
        # no more files than needed: a cut is at a chunk's edge or beside a finished image
        for left, right in itertools.pairwise(missing):
            assert left.stop < right.start or right.start % size == 0


def test_covering_takes_each_image_once_from_a_file_that_has_it(rng: random.Random) -> None:
    for _ in range(100):
        count, ranges = rng.randint(1, 45), draw_ranges(rng)
        if rng.random() < 0.7:
            ranges += missing_ranges(ranges, count, rng.randint(1, 12))
        rng.shuffle(ranges)
        absent = sorted(set(range(count)) - covered(ranges, count))
        if absent:
            with pytest.raises(MissingArtifact, match=f"image {absent[0]} of {count}"):
                covering(ranges, count)
            continue
        chosen = covering(ranges, count)
        taken = [index for part, rows in chosen for index in part.indices[rows]]
        assert taken == list(range(count))
        assert all(part in ranges and rows.start >= 0 for part, rows in chosen)


# --- artifacts --------------------------------------------------------------------------------


def test_a_damaged_artifact_is_gone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.load("k" * 64) is None
    run.save("k" * 64, {"scale": torch.ones(3)}, {"part": "toy"})
    found = run.load("k" * 64)
    assert found is not None
    assert torch.equal(found["scale"], torch.ones(3))
    (path,) = (tmp_path / "artifacts").glob("*.safetensors")
    damage_truncated(path)
    assert run.load("k" * 64) is None
    assert not path.exists()


# --- weights ----------------------------------------------------------------------------------


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.safetensors"])
@pytest.mark.parametrize(
    "save",
    [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))],
    ids=["torch", "pickle"],
)
def test_pickled_code_is_refused_and_not_run(
    tmp_path: Path, name: str, save: Callable[[Any, Path], Any]
) -> None:
    path, proof = tmp_path / name, tmp_path / "proof"
    save({"weight": torch.zeros(2), "payload": Payload(proof)}, path)
    with pytest.raises(CorruptFile, match=rf"weights {re.escape(str(path))}: .*code are refused"):
        load_weights(path)
    assert not proof.exists()
    torch.save(Payload(proof), tmp_path / "careless.pt")
    torch.load(tmp_path / "careless.pt", weights_only=False)
    assert proof.exists()  # it is a working payload


def test_plain_weights_load_from_both_kinds_of_file(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(2, 3), "b": torch.arange(4)}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        found = load_weights(tmp_path / name)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_damaged_and_missing_weights_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_weights(path)
    (save_file if path.suffix == ".safetensors" else torch.save)({"a": torch.zeros(50)}, path)
    damage_truncated(path)
    with pytest.raises(CorruptFile, match=re.escape(str(path))):
        load_weights(path)
