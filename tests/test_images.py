"""Image collections: what is on disk is what comes out, in one order, prepared by known rules."""

from __future__ import annotations

import gzip
import multiprocessing
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.images import ImageCollection, ImagePreparation, Subset, load_all, open_images
from iec_eval.metrics.statistics import open_reference


def picture(path: Path, value: int | tuple[int, ...] = 0, *, size: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(value, int) else "RGB", (size, size), value).save(path)


def grey(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8)[None]


def idx(array: np.ndarray) -> bytes:
    """An array in the format of MNIST's files."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


# --- collections ------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name, value in (("b.png", 2), ("a.PNG", 1), ("deep/er.bmp", 4), ("c.png", 3)):
        picture(tmp_path / name, value)
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(str(tmp_path))
    assert [int(images.image(i)[0, 0, 0]) for i in range(len(images))] == [1, 2, 3, 4]
    assert images.class_names is None
    assert images.label(0) is None


def test_subfolders_are_the_classes(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/9.png", "cat/a/b.png"):
        picture(tmp_path / name)
    images = open_images(str(tmp_path))
    assert images.class_names == ["cat", "dog"]
    assert [images.label(i) for i in range(len(images))] == [0, 0, 1]


def test_colours_stay_and_other_modes_become_rgb(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", (10, 20, 30))
    Image.new("P", (4, 4)).save(tmp_path / "2.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 0)).save(tmp_path / "3.png")
    images = open_images(str(tmp_path))
    assert images.image(0)[:, 0, 0].tolist() == [10, 20, 30]
    assert images.image(0).dtype == torch.uint8
    assert [images.image(i).shape[0] for i in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("keys", [("arr_0", "arr_1"), ("images", "labels")])
def test_an_npz_holds_images_and_labels(tmp_path: Path, keys: tuple[str, str]) -> None:
    pixels = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (pixels, np.array([2, 0])), strict=True)))
    images = open_images(str(tmp_path / "a.npz"))
    assert torch.equal(images.image(1), torch.from_numpy(pixels[1].transpose(2, 0, 1)))
    assert [images.label(0), images.label(1)] == [2, 0]
    assert images.class_names == ["0", "1", "2"]


def test_an_npz_without_labels_has_no_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((2, 3, 3, 1), dtype=np.uint8))
    images = open_images(str(tmp_path / "a.npz"))
    assert (images.class_names, images.label(0)) == (None, None)


def zipped(folder: Path, path: Path, **extra: str) -> Path:
    """All files of ``folder`` in a zip file, not in their order, and ``extra`` texts."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
        for name, text in extra.items():
            archive.writestr(name, text)
    return path


@pytest.mark.parametrize("names", [("a-b/1.png", "a/2.PNG", "a/b/3.bmp"), ("2.png", "a/1.png")])
def test_a_zip_is_the_folder_it_unpacks_to(tmp_path: Path, names: tuple[str, ...]) -> None:
    for value, name in enumerate(names):
        picture(tmp_path / "in" / name, value)
    extra = {"dataset.json": "{}", "__MACOSX/a/2.png": "fork", "a/._2.png": "fork", "x.png/": ""}
    zipped(tmp_path / "in", tmp_path / "Images.ZIP", **extra)
    folder, images = open_images(str(tmp_path / "in")), open_images(str(tmp_path / "Images.ZIP"))
    assert len(images) == len(folder) == len(names)
    assert images.class_names == folder.class_names
    for index in range(len(folder)):
        assert images.label(index) == folder.label(index)
        assert torch.equal(images.image(index), folder.image(index))


@pytest.fixture
def many(tmp_path: Path) -> ImageCollection:
    """A zip file of 40 noisy images; the value of the first pixel is the index."""
    (tmp_path / "many").mkdir()
    for index in range(40):
        noise = np.random.default_rng(index).integers(0, 256, (40, 40), dtype=np.uint8)
        noise[0, 0] = index
        Image.fromarray(noise).save(tmp_path / "many" / f"{index:02d}.png")
    return open_images(str(zipped(tmp_path / "many", tmp_path / "many.zip")))


def first_pixels(images: ImageCollection) -> list[int]:
    return [int(images.image(index)[0, 0, 0]) for index in range(len(images))]


def test_a_zip_is_read_by_threads_at_once(many: ImageCollection) -> None:
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: first_pixels(many), range(16)))
    assert read == [list(range(40))] * 16


def test_a_zip_is_read_by_forked_processes_at_once(many: ImageCollection) -> None:
    """They inherit the open file and with it, were it used, one position in it."""

    def read() -> None:
        for _ in range(10):
            assert first_pixels(many) == list(range(40))

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=read) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def test_a_zip_is_read_by_spawned_processes(many: ImageCollection) -> None:
    assert first_pixels(pickle.loads(pickle.dumps(many))) == list(range(40))


def test_torchvision_data_on_disk_is_read(fashion: Path) -> None:
    images = open_images(f"torchvision:FashionMNIST:{fashion}:train")
    assert len(images) == 5
    assert images.class_names is not None
    assert images.class_names[9] == "Ankle boot"
    assert [images.label(i) for i in range(5)] == [9, 8, 7, 6, 5]
    assert torch.equal(images.image(3), torch.full((1, 28, 28), 3, dtype=torch.uint8))
    assert len(open_images(f"torchvision:FashionMNIST:{fashion}:test")) == 2


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Fashion-MNIST's own files with a handful of images."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 5), ("t10k", 2)):
        pixels = np.stack([np.full((28, 28), i, dtype=np.uint8) for i in range(count)])
        labels = np.array([9 - i for i in range(count)], dtype=np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            (raw / f"{stem}-{kind}-ubyte").write_bytes(gzip.decompress(idx(array)))
            (raw / f"{stem}-{kind}-ubyte.gz").write_bytes(idx(array))
    return tmp_path


def test_a_subset_is_the_beginning(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png", "b/3.png"):
        picture(tmp_path / name, int(Path(name).stem))
    images = open_images(str(tmp_path))
    some = Subset(images, 2)
    assert len(some) == 2
    assert some.class_names == images.class_names
    assert [(int(some.image(i)[0, 0, 0]), some.label(i)) for i in range(2)] == [(1, 0), (2, 1)]


def test_a_whole_collection_in_memory(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        picture(tmp_path / name, int(Path(name).stem))
    pixels, labels = load_all(open_images(str(tmp_path)), ImagePreparation(channels=3))
    assert pixels.shape == (2, 3, 4, 4)
    assert pixels.dtype == torch.uint8
    assert labels is not None
    assert labels.tolist() == [0, 1]
    picture(tmp_path / "c" / "1.png")
    assert load_all(open_images(str(tmp_path / "c")), ImagePreparation())[1] is None


# --- preparation, against values worked out by hand -------------------------------------------


def test_nothing_asked_nothing_done() -> None:
    image = torch.randint(0, 256, (3, 6, 6), dtype=torch.uint8)
    assert torch.equal(ImagePreparation()(image), image)


def test_the_crop_is_the_middle_square() -> None:
    wide = grey([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    assert ImagePreparation()(wide).tolist() == [[[2, 3], [7, 8]]]
    assert ImagePreparation()(wide.transpose(1, 2)).tolist() == [[[2, 7], [3, 8]]]


def test_the_border_is_black_and_on_every_side() -> None:
    padded = ImagePreparation(pad=1)(grey([[9, 8], [7, 6]]))
    assert padded.tolist() == [[[0, 0, 0, 0], [0, 9, 8, 0], [0, 7, 6, 0], [0, 0, 0, 0]]]


def test_shrinking_averages_areas_and_rounds_to_nearest() -> None:
    image = grey([[10, 20, 0, 0], [30, 41, 0, 3], [255, 255, 1, 1], [255, 255, 1, 0]])
    # means 25.25, 0.75, 255 and 0.75
    assert ImagePreparation(size=2)(image).tolist() == [[[25, 1], [255, 1]]]


def test_an_uneven_shrink_weighs_whole_pixels() -> None:
    # 3 -> 2: windows of pixels 0-1 and 1-2
    image = grey([[0, 100, 200]] * 3)
    assert ImagePreparation(size=2)(image).tolist() == [[[50, 150], [50, 150]]]


def test_padding_comes_before_shrinking() -> None:
    image = ImagePreparation(pad=1, size=2)(grey([[100, 101], [102, 103]]))
    assert image.tolist() == [[[25, 25], [26, 26]]]  # a quarter of each, 25.25 .. 25.75


def test_grey_is_repeated_and_colour_becomes_luma() -> None:
    assert ImagePreparation(channels=3)(grey([[7]])).tolist() == [[[7]], [[7]], [[7]]]
    colour = torch.tensor([255, 100, 3], dtype=torch.uint8).view(3, 1, 1)
    luma = 0.299 * 255 + 0.587 * 100 + 0.114 * 3  # 135.287
    assert ImagePreparation(channels=1)(colour).item() == round(luma)
    white = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    assert ImagePreparation(channels=1)(white).item() == 255


# --- other recipes, against PIL and against guided-diffusion's order of work ---------------------


def noisy(height: int, width: int, channels: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=random)


def as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
def test_filters_are_pils_on_the_middle_square(name: str) -> None:
    image = noisy(21, 30)
    square = as_picture(image).crop((4, 0, 25, 21))
    wanted = square.resize((8, 8), getattr(Image.Resampling, name.upper()))
    assert torch.equal(ImagePreparation(size=8, resize=name)(image), as_tensor(wanted))


def test_without_a_crop_the_image_is_stretched() -> None:
    image = noisy(10, 20)
    wanted = as_picture(image).resize((7, 7), Image.Resampling.LANCZOS)
    prepare = ImagePreparation(size=7, resize="lanczos", crop="none")
    assert torch.equal(prepare(image), as_tensor(wanted))
    assert torch.equal(ImagePreparation(crop="none")(image), image)
    area = ImagePreparation(size=5, crop="none")(image).float()
    wanted_area = image.float().reshape(3, 5, 2, 5, 4).mean(dim=(2, 4)).round()
    assert torch.equal(area, wanted_area)


@pytest.mark.parametrize(("height", "width"), [(67, 50), (33, 90), (16, 17), (8, 8), (5, 7)])
def test_adm_halves_then_bicubic_then_crops(height: int, width: int) -> None:
    size, image = 8, noisy(height, width)
    picture = as_picture(image)
    while min(picture.size) >= 16:
        picture = picture.resize((picture.size[0] // 2, picture.size[1] // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(
        (round(picture.size[0] * scale), round(picture.size[1] * scale)), Image.Resampling.BICUBIC
    )
    left, top = (picture.size[0] - size) // 2, (picture.size[1] - size) // 2
    wanted = as_tensor(picture.crop((left, top, left + size, top + size)))
    assert torch.equal(ImagePreparation(size=8, resize="adm")(image), wanted)


def test_no_resize_demands_the_size() -> None:
    prepare = ImagePreparation(size=8, resize="none")
    assert prepare(noisy(8, 9)).shape == (3, 8, 8)
    with pytest.raises(ConfigError, match=r"resize none wants images of 8x8 pixels, got 9x9"):
        prepare(noisy(9, 12))
    uncropped = ImagePreparation(size=8, resize="none", crop="none")
    with pytest.raises(ConfigError, match=r"wants images of 8x8 pixels, got 9x8"):
        uncropped(noisy(8, 9))


def test_padding_comes_before_a_filter_too() -> None:
    image = noisy(6, 6)
    bordered = torch.nn.functional.pad(image, (1, 1, 1, 1))
    wanted = as_picture(bordered).resize((4, 4), Image.Resampling.BICUBIC)
    prepare = ImagePreparation(pad=1, size=4, resize="bicubic")
    assert torch.equal(prepare(image), as_tensor(wanted))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": "cubic"}, "resize: wanted one of area, bilinear, bicubic, .*got 'cubic'"),
        ({"crop": "left"}, "crop: wanted one of center, none, got 'left'"),
        ({"resize": "lanczos"}, "resize lanczos wants a size, got none; give --size"),
        (
            {"resize": "adm", "size": 8, "pad": 1},
            "adm crops by itself .* got crop center and pad 1",
        ),
        ({"resize": "adm", "size": 8, "crop": "none"}, "adm crops by itself .* got crop none"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ImagePreparation(**settings)


def test_the_record_names_every_choice_and_keeps_old_descriptions() -> None:
    packaged = open_reference("fashion-mnist").source["preparation"]
    assert ImagePreparation(**packaged).record() == packaged
    assert ImagePreparation(pad=2, size=16, channels=1).record() == packaged
    chosen = ImagePreparation(size=16, crop="none", resize="lanczos")
    assert chosen.record() == asdict(chosen)


# --- what can be wrong ------------------------------------------------------------------------


def test_a_missing_collection_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"wanted a folder, a \.zip or \.npz file or torchvision:"
    ):
        open_images(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"no image files there \(wanted \.bmp \.jpeg"):
        open_images(str(tmp_path))


def test_a_picture_of_more_than_8_bits_is_refused(tmp_path: Path) -> None:
    """Cut off at 255 it would be nearly white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path, "a.png")
    for source, index in ((tmp_path, 0), (tmp_path / "images.zip", 0)):
        with pytest.raises(ConfigError, match=r"[ab]\.\w+.*: has more than 8 bits a channel"):
            open_images(str(source)).image(index)


@pytest.mark.parametrize("damage", ["cut short", "bytes flipped", "no image"])
def test_a_damaged_picture_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(255 - b for b in whole[middle : middle + 9])
    contents = {
        "cut short": whole[:middle],
        "bytes flipped": flipped + whole[middle + 9 :],
        "no image": b"hello",
    }
    path.write_bytes(contents[damage])
    with pytest.raises(CorruptFile, match=r"image .*a\.png: cannot be read"):
        open_images(str(tmp_path)).image(0)


@pytest.mark.parametrize("damage", ["empty", "text", "cut short"])
def test_a_damaged_zip_is_named(tmp_path: Path, damage: str) -> None:
    picture(tmp_path / "in" / "a.png")
    path = zipped(tmp_path / "in", tmp_path / "a.zip")
    whole = path.read_bytes()
    contents = {"empty": b"", "text": b"hello", "cut short": whole[: len(whole) // 2]}
    path.write_bytes(contents[damage])
    with pytest.raises(CorruptFile, match=r"a\.zip: not a readable zip file"):
        open_images(str(path))


def encrypted(content: bytes) -> bytes:
    """With the flags that say so, in the entry's own header and in the directory."""
    directory = content.index(b"PK\x01\x02")
    flagged = bytearray(content)
    flagged[6] |= 1
    flagged[directory + 8] |= 1
    return bytes(flagged)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda content: content[:60] + bytes(255 - b for b in content[60:70]) + content[70:],
    "no header": lambda content: b"XX" + content[2:],
    "encrypted": encrypted,
}


@pytest.mark.parametrize("damage", [*DAMAGES, "no image"])
def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path, damage: str) -> None:
    picture(tmp_path / "in" / "a.png", size=30)
    if damage == "no image":
        (tmp_path / "in" / "a.png").write_text("hello")
    path = zipped(tmp_path / "in", tmp_path / "a.zip")
    path.write_bytes(DAMAGES.get(damage, bytes)(path.read_bytes()))
    with pytest.raises(CorruptFile, match=r"image a\.png in .*a\.zip: cannot be read"):
        open_images(str(path)).image(0)


def test_a_zip_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = zipped(tmp_path / "in", tmp_path / "a.zip", **{"dataset.json": "{}"})
    with pytest.raises(ConfigError, match=r"a\.zip': no image files in it \(wanted \.bmp"):
        open_images(str(path))


def test_published_statistics_are_no_images(tmp_path: Path) -> None:
    images = np.zeros((2, 3, 3, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=images, mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ConfigError, match=r"a\.npz: wanted images, got published.*--statistics"):
        open_images(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("damage", ["empty", "text", "cut short", "flipped", "pickle", "npy"])
def test_a_damaged_npz_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, np.random.default_rng(0).integers(0, 9, (9, 8, 8, 1), dtype=np.uint8))
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "text": b"hello",
        "cut short": whole[: len(whole) // 2],
        "flipped": whole[:80] + bytes(255 - b for b in whole[80:120]) + whole[120:],
    }
    if damage == "pickle":
        np.savez(path, np.array([{"code": 1}], dtype=object))
    elif damage == "npy":
        np.save(tmp_path / "a.npy", np.zeros(3))
        (tmp_path / "a.npy").rename(path)
    else:
        path.write_bytes(contents[damage])
    with pytest.raises(CorruptFile, match=r"a\.npz: not a readable npz file"):
        open_images(str(path))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 3, 3, 1))}, r"wanted uint8 NHWC .* got .*float64"),
        ({"arr_0": np.zeros((2, 3, 3), dtype=np.uint8)}, r"got .*\(2, 3, 3\)"),
        ({"pictures": np.zeros((2, 3, 3, 1), dtype=np.uint8)}, "got .*pictures"),
        (
            {"arr_0": np.zeros((2, 3, 3, 1), dtype=np.uint8), "arr_1": np.array([1])},
            r"wanted 2 labels in one row, got \(1,\)",
        ),
    ],
)
def test_an_npz_of_something_else_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        open_images(str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:FashionMNIST", "wanted torchvision:NAME:ROOT:SPLIT"),
        ("torchvision:NoSuchData:ROOT:train", "has no data set 'NoSuchData'"),
        ("torchvision:utils:ROOT:train", "torchvision utils: no data set with a split 'train'"),
        ("torchvision:FashionMNIST:ROOT:train", "torchvision FashionMNIST under .*not found"),
        ("torchvision:FashionMNIST:ROOT:validation", "no data set with a split 'validation'"),
        ("torchvision:STL10:ROOT:train", "torchvision STL10 under"),
        ("torchvision:STL10:ROOT:validation", "torchvision STL10 under .*validation"),
    ],
)
def test_a_wrong_torchvision_source_is_refused(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_images(source.replace("ROOT", str(tmp_path)))


def test_a_subset_of_more_than_there_is_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="2 images wanted, the collection has 1"):
        Subset(open_images(str(tmp_path)), 2)


def test_several_shapes_are_refused_unless_prepared_alike(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 5)
    picture(tmp_path / "b.png", (5, 5, 5), size=6)
    images = open_images(str(tmp_path))
    with pytest.raises(ConfigError, match=r"several shapes \[\(1, 4, 4\), \(3, 6, 6\)\]"):
        load_all(images, ImagePreparation())
    assert load_all(images, ImagePreparation(size=4, channels=1))[0].shape == (2, 1, 4, 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_other_numbers_of_channels_cannot_be_changed(channels: int) -> None:
    with pytest.raises(ConfigError, match="wanted images of 1 or 3 channels, got 4"):
        ImagePreparation(channels=channels)(torch.zeros(4, 2, 2, dtype=torch.uint8))
