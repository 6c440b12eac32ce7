"""Published statistics: read as they are, checked, and never taken for what they are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import Result
from torch import Tensor

from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.metrics import features as networks
from iec_eval.metrics.features import Features, InceptionV3
from iec_eval.metrics.fid import FID, FIDOptions
from iec_eval.metrics.published import import_statistics
from iec_eval.metrics.statistics import Moments, ReferenceStatistics, open_reference

Cli = Callable[..., Result]
SIZE = 24
FORMATS = ["pytorch-fid", "guided-diffusion", "edm"]
GUIDED = ["--statistics", "guided-diffusion"]


def draw(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Positive correlated features, float32 ``[count, SIZE]``."""
    mixing = np.random.default_rng(0).normal(size=(SIZE, SIZE)) / 5
    values = np.random.default_rng(seed).normal(size=(count, SIZE)) @ mixing + shift
    return np.exp(values).astype(np.float32)


REAL, FAKE = draw(300, 1), draw(200, 2, shift=0.3)
MU, SIGMA = REAL.astype(np.float64).mean(axis=0), np.cov(REAL.astype(np.float64), rowvar=False)


def arrays(form: str) -> dict[str, np.ndarray]:
    """What a file of that project holds."""
    if form != "guided-diffusion":
        return {"mu": MU, "sigma": SIGMA}
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    images = np.random.default_rng(3).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    return {"arr_0": images, "mu": MU, "sigma": SIGMA, **spatial}


@pytest.fixture(autouse=True)
def small_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """InceptionV3 with fewer features; an image's are functions of its pixels' mean."""

    def extract(network: InceptionV3, images: Tensor) -> Features:
        means = images.float().mean(dim=(1, 2, 3))
        return Features(means[:, None] * torch.arange(SIZE), means[:, None])

    monkeypatch.setattr(InceptionV3, "dimensions", SIZE)
    monkeypatch.setattr(InceptionV3, "extract", extract)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"any")
    return path


@pytest.fixture
def network(weights: Path) -> InceptionV3:
    return InceptionV3(weights)


def written(folder: Path, form: str, **changes: Any) -> Path:
    path = folder / f"{form}.npz"
    content = {**arrays(form), **changes}
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


def frechet_distance() -> float:
    """Heusel et al. 2017, eq. 6, with scipy's matrix square root."""
    fake = FAKE.astype(np.float64)
    sigma, gap = np.cov(fake, rowvar=False), fake.mean(axis=0) - MU
    root = scipy.linalg.sqrtm(sigma @ SIGMA).real
    return float(gap @ gap + np.trace(sigma + SIGMA - 2 * root))


def scored(reference: Path, weights: Path, **options: Any) -> tuple[FID, dict[str, float]]:
    metric = FID(FIDOptions(reference=str(reference), weights=str(weights), **options))
    metric.prepare(len(FAKE))
    features = torch.from_numpy(FAKE)
    metric.update(Features(features, features), torch.arange(len(FAKE)))
    return metric, metric.compute()


# --- what is in the file is what is compared with -----------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", [None, 300])
def test_fid_to_published_statistics_is_the_formula(
    cli: Cli, weights: Path, tmp_path: Path, form: str, count: int | None
) -> None:
    path, out = written(tmp_path, form), tmp_path / "out.safetensors"
    limit = [] if count is None else ["--count", count]
    told = cli("reference", path, out, "--statistics", form, "--weights", weights, *limit)
    assert told.exit_code == 0, told.stderr
    number = count or "an unknown number of"
    assert told.stdout.startswith(f"{out}: {number} images, {SIZE} features\n")
    other = form == "pytorch-fid"
    metric, result = scored(out, weights, allow_other_protocol=other)
    assert result == {f"fid{'-vs-pytorch-fid' * other}": pytest.approx(frechet_distance())}
    assert metric.reference.count == count
    assert metric.protocol()["reference"]["count"] == count
    assert metric.reference.source["format"] == form
    assert metric.reference.source["sha256"] == networks.sha256(path)


def test_published_and_native_statistics_of_the_same_features_agree(
    network: InceptionV3, weights: Path, tmp_path: Path
) -> None:
    moments = Moments(SIZE)
    moments.update(torch.from_numpy(REAL))
    native = ReferenceStatistics(
        *(moments.mean, moments.covariance(), moments.count), network.identity()
    )
    native.save(tmp_path / "native")
    import_statistics(written(tmp_path, "edm"), "edm", network).save(tmp_path / "imported")
    _, wanted = scored(tmp_path / "native", weights)
    assert scored(tmp_path / "imported", weights)[1] == pytest.approx(wanted, rel=1e-6)


def test_statistics_without_a_count_come_back_as_saved(
    network: InceptionV3, tmp_path: Path
) -> None:
    made = import_statistics(written(tmp_path, "edm"), "edm", network)
    made.save(tmp_path / "a")
    loaded = open_reference(str(tmp_path / "a"))
    assert (loaded.count, loaded.kept) == (None, None)
    assert loaded.digest() == made.digest()
    known = import_statistics(written(tmp_path, "edm"), "edm", network, count=300)
    assert known.digest() != made.digest()
    np.testing.assert_array_equal(loaded.mu, MU)
    np.testing.assert_array_equal(loaded.sigma, SIGMA)


def test_single_precision_and_few_images_are_within_rounding(
    network: InceptionV3, tmp_path: Path
) -> None:
    few = np.cov(REAL[:10].astype(np.float64), rowvar=False)  # singular
    changes = {"mu": MU.astype(np.float32), "sigma": few.astype(np.float32)}
    made = import_statistics(written(tmp_path, "edm", **changes), "edm", network)
    assert made.sigma.dtype == made.mu.dtype == torch.float64


def test_images_beside_statistics_give_features(
    cli: Cli, network: InceptionV3, weights: Path, tmp_path: Path
) -> None:
    path, out = written(tmp_path, "guided-diffusion"), tmp_path / "out"
    options = ["--weights", weights, "--keep-features", 3]
    told = cli("reference", path, out, *GUIDED, *options)
    assert told.exit_code == 0, told.stderr
    kept = open_reference(str(out)).kept
    assert kept is not None
    images = torch.from_numpy(arrays("guided-diffusion")["arr_0"][[0, 2, 4]]).permute(0, 3, 1, 2)
    assert torch.equal(kept.read(), network.extract(images).features)


# --- protocols ----------------------------------------------------------------------------------


def test_pytorch_fid_resizes_otherwise_and_is_refused(
    network: InceptionV3, weights: Path, tmp_path: Path
) -> None:
    made = import_statistics(written(tmp_path, "pytorch-fid"), "pytorch-fid", network)
    differing = {k for k, v in network.identity().items() if made.protocol[k] != v}
    assert differing == {"resize"}
    made.save(tmp_path / "a")
    with pytest.raises(Incompatible, match=r"resize: 'torch bilinear .*allow_other_protocol: true"):
        scored(tmp_path / "a", weights)


def test_the_result_carries_both_protocols_if_they_differ(
    network: InceptionV3, weights: Path, tmp_path: Path
) -> None:
    for form in ("pytorch-fid", "edm"):
        import_statistics(written(tmp_path, form), form, network).save(tmp_path / form)
    other, _ = scored(tmp_path / "pytorch-fid", weights, allow_other_protocol=True)
    found = other.protocol()
    assert found["features"] == network.identity()
    assert found["reference"]["protocol"] == other.reference.protocol != network.identity()
    same, result = scored(tmp_path / "edm", weights, allow_other_protocol=True)
    assert list(result) == ["fid"]
    assert "protocol" not in same.protocol()["reference"]


def test_another_protocol_of_our_own_is_named_for_it(
    network: InceptionV3, weights: Path, tmp_path: Path
) -> None:
    protocol = {**network.identity(), "weights": "others"}
    numbers = torch.from_numpy(MU), torch.from_numpy(SIGMA), 300
    ReferenceStatistics(*numbers, protocol).save(tmp_path / "a")
    _, result = scored(tmp_path / "a", weights, allow_other_protocol=True)
    assert result == {"fid-vs-other-protocol": pytest.approx(frechet_distance())}


def test_other_dimensions_are_refused_even_then(weights: Path, tmp_path: Path) -> None:
    ReferenceStatistics(torch.zeros(3).double(), torch.eye(3).double(), 9, {}).save(tmp_path / "a")
    with pytest.raises(Incompatible, match=rf"a' has 3 features, wanted {SIZE}"):
        scored(tmp_path / "a", weights, allow_other_protocol=True)


# --- what can be wrong --------------------------------------------------------------------------


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no sigma": ({"sigma": None}, ConfigError, "wanted the arrays mu and sigma, got mu; if these"),
    "other names": (
        {"mu": None, "sigma": None, "m": MU, "s": SIGMA},
        ConfigError,
        "wanted the arrays mu and sigma, got m, s",
    ),
    "other dimensions": (
        {"mu": MU[:-1], "sigma": SIGMA[:-1, :-1]},
        ConfigError,
        r"wanted mu \(24,\) and sigma \(24, 24\), got \(23,\) and \(23, 23\)",
    ),
    "a row": ({"mu": MU[None]}, ConfigError, r"got \(1, 24\) and \(24, 24\)"),
    "integers": ({"mu": MU.astype(int)}, ConfigError, "mu of floating-point numbers, got int64"),
    "not finite": ({"sigma": SIGMA * np.nan}, CorruptFile, "sigma holds numbers that are not fin"),
    "not symmetric": (
        {"sigma": SIGMA + np.triu(np.full((SIZE, SIZE), 0.01), 1)},
        CorruptFile,
        "wanted a symmetric sigma, got one whose halves differ by 0.01",
    ),
    "negative": ({"sigma": SIGMA - np.eye(SIZE)}, CorruptFile, "with eigenvalues from -"),
    "zero": ({"sigma": 0 * SIGMA}, CorruptFile, "with eigenvalues from 0 to 0"),
    "pickled": ({"mu": np.array([{"a": 1}])}, CorruptFile, "not a readable npz file"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_numbers_are_refused(network: InceptionV3, tmp_path: Path, wrong: str) -> None:
    changes, error, message = WRONG[wrong]
    path = written(tmp_path, "edm", **changes)
    with pytest.raises(error, match=rf"statistics .*edm\.npz: .*{message}"):
        import_statistics(path, "edm", network)


@pytest.mark.parametrize("damage", ["empty", "text", "cut short", "flipped", "one array"])
def test_damaged_files_are_refused(network: InceptionV3, tmp_path: Path, damage: str) -> None:
    path = written(tmp_path, "edm")
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "text": b"hello",
        "cut short": whole[: len(whole) // 2],
        "flipped": whole[:200] + bytes(255 - b for b in whole[200:220]) + whole[220:],
    }
    if damage == "one array":
        np.save(tmp_path / "a.npy", MU)
        (tmp_path / "a.npy").rename(path)
    else:
        path.write_bytes(contents[damage])
    with pytest.raises(CorruptFile, match=r"edm\.npz: not a readable npz file"):
        import_statistics(path, "edm", network)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["edm.npz", "out"], "edm.npz: wanted images, got published statistics (mu and sigma)"),
        (["guided-diffusion.npz", "out"], "--statistics pytorch-fid, guided-diffusion or edm"),
        (["none.npz", "out", "--statistics", "edm"], "statistics none.npz: no such file"),
        (["edm.npz", "out", "--statistics", "edm", "--size", 8], "leave --crop, --pad, --size"),
        (["edm.npz", "out", "--statistics", "edm", "--crop", "none"], "leave --crop, --pad"),
        (["edm.npz", "out", "--statistics", "edm", "--count", 1], "a count of two images or more"),
        (
            ["edm.npz", "out", "--statistics", "edm", "--keep-features", 2],
            "files of edm hold no images to keep features of",
        ),
        (
            ["guided-diffusion.npz", "out", *GUIDED, "--keep-features", 8],
            "features of 8 images to be kept, there are 7 images",
        ),
        (["edm.npz", "edm.npz", "--statistics", "edm"], "OUT edm.npz: is the file that is read"),
        (["edm.npz", ".", "--statistics", "edm"], "OUT .: is a folder; give the name of a new"),
        (["edm.npz", "out", "--resize", "adm"], "resize adm wants a size, got none; give --size"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    cli: Cli,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(InceptionV3, "load", lambda network: None)
    files = {form: written(tmp_path, form).read_bytes() for form in FORMATS}
    told = cli("reference", *words, "--weights", weights)
    assert told.exit_code == 2, told.output
    assert message in told.stderr
    assert "Traceback" not in told.stderr
    assert not Path("out").exists()
    assert files == {form: Path(f"{form}.npz").read_bytes() for form in FORMATS}


def test_other_networks_have_no_published_statistics(cli: Cli, tmp_path: Path) -> None:
    path = written(tmp_path, "edm")
    words = ["--statistics", "edm", "--features", "fashion-mnist"]
    told = cli("reference", path, tmp_path / "out", *words)
    assert told.exit_code == 2
    assert (
        "those of edm are of InceptionV3, got features 'fashion'; leave --features" in told.stderr
    )


def test_the_weights_must_be_there(cli: Cli, tmp_path: Path) -> None:
    words = ["--statistics", "edm", "--weights", tmp_path / "none.pth"]
    told = cli("reference", written(tmp_path, "edm"), tmp_path / "out", *words)
    assert told.exit_code == 2
    assert "features inception: no weights at" in told.stderr


def test_weights_that_are_not_the_published_ones_are_told_of(
    cli: Cli, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["reference", written(tmp_path, "edm"), tmp_path / "out", "--statistics", "edm"]
    assert "not the published one" in cli(*words, "--weights", weights).stdout
    assert open_reference(str(tmp_path / "out")).source["published_weights"] is False
    monkeypatch.setattr(networks, "INCEPTION_SHA256", networks.sha256(weights)[:8])
    assert "note" not in cli(*words, "--weights", weights).stdout
    assert open_reference(str(tmp_path / "out")).source["published_weights"] is True
