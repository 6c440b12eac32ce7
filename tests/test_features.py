"""Feature networks: identity, refusals, batch independence, agreement with torch-fidelity."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iec_eval.errors import ConfigError, CorruptFile, Incompatible, UnknownName
from iec_eval.images import FolderImages, ImagePreparation, load_all
from iec_eval.metrics import features
from iec_eval.metrics.features import (
    ClassifierFeatures,
    ImageClassifier,
    InceptionV3,
    feature_network,
)
from iec_eval.metrics.fid import FID, FIDOptions
from iec_eval.metrics.inception_score import InceptionScore, InceptionScoreOptions
from iec_eval.metrics.statistics import reference_from_images
from iec_eval.training.classifier import save_features

IMAGES = torch.randint(
    0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def make_folder(folder: Path, *, seed: int = 0, tag: str = "toy") -> Path:
    torch.manual_seed(seed)
    save_features(ImageClassifier(channels=1, size=8, classes=3, width=4), folder, tag)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "toy")


def test_spec_names_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(features.PACKAGED, "packed", folder.parent / "packed")
    make_folder(folder.parent / "packed" / "features", tag="packed")
    assert feature_network("inception").tag == ""
    assert feature_network(str(folder)).tag == "toy"
    assert feature_network("packed").tag == "packed"


def test_unknown_spec_lists_the_choices() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'inception'.*fashion-mnist.*a folder"):
        feature_network("inceptoin")


def test_weights_belong_to_inception_only(folder: Path) -> None:
    with pytest.raises(ConfigError, match="own weights"):
        feature_network(str(folder), "weights.pth")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", CorruptFile, "not JSON"),
        ('{"tag": "x"}', ConfigError, "'channels' is missing"),
        ("{}", ConfigError, "'tag' is missing"),
        ("[1]", CorruptFile, "wanted an object"),
    ],
)
def test_wrong_card(folder: Path, text: str, error: type[Exception], message: str) -> None:
    (folder / "features.json").write_text(text)
    with pytest.raises(error, match=message):
        feature_network(str(folder))


@pytest.mark.parametrize("tag", ["", "Toy", "a b", "-a"])
def test_tag_can_never_be_left_out(folder: Path, tag: str) -> None:
    card = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps({**card, "tag": tag}))
    with pytest.raises(ConfigError, match="tag"):
        feature_network(str(folder))


def test_missing_files(folder: Path) -> None:
    (folder / "features.safetensors").unlink()
    network = feature_network(str(folder))
    for use in (network.identity, network.load):
        with pytest.raises(ConfigError, match="no weights at"):
            use()
    (folder / "features.json").unlink()
    with pytest.raises(ConfigError, match=r"no features\.json"):
        feature_network(str(folder))


def test_identity_follows_the_weights_only(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in "abc")
    identities = [
        ClassifierFeatures(make_folder(path, seed=seed)).identity()
        for path, seed in [(first, 0), (second, 0), (other, 1)]
    ]
    assert identities[0] == identities[1]
    assert identities[0] != identities[2]


def test_features_are_per_image(folder: Path) -> None:
    network = ClassifierFeatures(folder)
    whole = network.extract(IMAGES)
    alone = [network.extract(image[None]) for image in IMAGES]
    assert whole.features.shape == (6, 64)
    assert whole.logits.shape == (6, 3)
    assert whole.features.dtype == torch.float32
    assert not whole.logits.requires_grad
    torch.testing.assert_close(whole.features, torch.cat([one.features for one in alone]))
    torch.testing.assert_close(whole.logits, torch.cat([one.logits for one in alone]))


def test_saved_network_is_the_network(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = ImageClassifier(channels=1, size=8, classes=3, width=4)
    network(IMAGES)  # moves the running statistics, which must be saved too
    save_features(network, tmp_path, "toy")
    with torch.no_grad():
        wanted, _ = network.eval()(IMAGES)
    assert torch.equal(ClassifierFeatures(tmp_path).extract(IMAGES).features, wanted)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 8)])
def test_classifier_refuses_other_images(folder: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(Incompatible, match=r"wanted images of shape \(1, 8, 8\)"):
        ClassifierFeatures(folder).extract(torch.zeros(2, *shape, dtype=torch.uint8))


def test_damaged_weights_are_refused(folder: Path) -> None:
    path = folder / "features.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFile, match=r"features\.safetensors: cannot be read"):
        ClassifierFeatures(folder).load()


def test_weights_of_another_width_are_refused(folder: Path, tmp_path: Path) -> None:
    save_features(ImageClassifier(1, 8, 3, width=5), tmp_path / "wide", "toy")
    (tmp_path / "wide" / "features.safetensors").replace(folder / "features.safetensors")
    with pytest.raises(CorruptFile, match="not the tensors of this network"):
        ClassifierFeatures(folder).load()


def test_inception_without_weights_says_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = feature_network("inception")
    wanted = r"checkpoints/weights-inception-2015-12-05-6726825d\.pth.*https://github\.com/toshas"
    for use in (network.identity, network.load):
        with pytest.raises(ConfigError, match=wanted):
            use()


def test_default_weights_must_be_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = features.default_inception_weights()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a download")
    with pytest.raises(CorruptFile, match="not the published file"):
        feature_network("inception").identity()


def test_inception_refuses_pickled_code(tmp_path: Path) -> None:
    path, trace = tmp_path / "inception.pth", tmp_path / "trace"
    torch.save({"fc.weight": Payload(trace)}, path)
    with pytest.raises(CorruptFile, match="files that contain pickled code are refused"):
        InceptionV3(path).load()
    assert not trace.exists()


def test_inception_refuses_damaged_and_other_weights(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "inception.pth"
    torch.save({"fc.weight": torch.zeros(100)}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(CorruptFile, match="cannot be read"):
        InceptionV3(damaged).load()
    with pytest.raises(CorruptFile, match="not the tensors of this network"):
        InceptionV3(folder / "features.safetensors").load()


def test_inception_refuses_two_channels(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="1 or 3 channels"):
        InceptionV3(tmp_path / "none").extract(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the true layout with random weights that keep the signal's variance."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
            """Keep what the constructor made."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Unloaded("inception-v3-compat", ["2048"], empty)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        _spread_logits(network, torch.stack([smooth_image(seed) for seed in range(8)]))
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def _spread_logits(network: nn.Module, images: Tensor) -> None:
    """Make the logits differ between images: a random network's are nearly all the same."""
    (features,) = network(images)
    mean = features.mean(dim=0)
    weight = torch.randn(network.fc.weight.shape)
    weight -= torch.outer(weight @ mean, mean) / mean.square().sum()
    network.fc.weight.copy_(2 * weight / (features @ weight.T).std())


def smooth_image(seed: int) -> Tensor:
    """A uint8 ``[3, 32, 32]`` image of few colours, its contrast drawn too."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=random) * torch.rand(1, 3, 1, 1, generator=random)
    image = nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)
    return (image[0] * 255).round().byte()


def write_pngs(folder: Path, seeds: range) -> Path:
    folder.mkdir()
    for seed in seeds:
        pixels = smooth_image(seed).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{seed:04d}.png")
    return folder


@pytest.mark.slow
def test_inception_path_equals_torch_fidelity(inception_weights: Path, tmp_path: Path) -> None:
    from torch_fidelity import calculate_metrics

    generated = write_pngs(tmp_path / "generated", range(100, 132))
    real = write_pngs(tmp_path / "real", range(200, 232))
    wanted = calculate_metrics(
        input1=str(generated),
        input2=str(real),
        feature_extractor_weights_path=str(inception_weights),
        fid=True,
        isc=True,
        isc_splits=1,
        batch_size=11,
        cuda=False,
        cache_root=str(tmp_path / "cache"),
        input1_cache_name="generated",  # else it reads the images once for each metric
        save_cpu_ram=True,
        verbose=False,
    )
    network = InceptionV3(inception_weights)
    preparation = ImagePreparation()
    statistics = reference_from_images(
        FolderImages(real), preparation, network, source="real", batch_size=16
    )
    statistics.save(tmp_path / "reference.safetensors")
    options = {"features": "inception", "weights": str(inception_weights)}
    reference = str(tmp_path / "reference.safetensors")
    fid = FID(FIDOptions(**options, reference=reference, allow_biased=True))
    score = InceptionScore(InceptionScoreOptions(**options, splits=1))
    fid.prepare(32)
    score.prepare(32)
    images, _ = load_all(FolderImages(generated), preparation)
    for indices in torch.split(torch.arange(32), 13):
        seen = network.extract(images[indices])
        fid.update(seen, indices)
        score.update(seen, indices)
    result = {**fid.compute(), **score.compute()}
    assert result["fid"] == pytest.approx(wanted["frechet_inception_distance"], rel=1e-4)
    assert result["is"] == pytest.approx(wanted["inception_score_mean"], rel=1e-4)
    assert result["is"] > 1.3  # a score that says nothing would agree too
    assert result["fid"] > 0.1


@pytest.mark.slow
def test_inception_sees_grey_as_three_equal_channels(inception_weights: Path) -> None:
    network = InceptionV3(inception_weights)
    grey = network.extract(IMAGES[:1])
    coloured = network.extract(IMAGES[:1].repeat(1, 3, 1, 1))
    assert torch.equal(grey.features, coloured.features)
    assert grey.logits.shape == (1, 1008)


@pytest.mark.slow
def test_inception_takes_the_multiply_accumulates_it_says(inception_weights: Path) -> None:
    network = InceptionV3(inception_weights)
    network.load()
    with FlopCounterMode(display=False) as counter:
        seen = network.extract(IMAGES[:2])
    assert counter.get_total_flops() // 2 == 2 * network.macs
    assert seen.logits.shape == (2, network.classes)


def test_a_classifier_takes_the_multiply_accumulates_it_says(folder: Path) -> None:
    network = ClassifierFeatures(folder)
    images = torch.zeros(2, network.card.channels, network.card.size, network.card.size)
    with FlopCounterMode(display=False) as counter:
        seen = network.extract(images.to(torch.uint8))
    assert counter.get_total_flops() // 2 == 2 * network.macs
    assert seen.logits.shape == (2, network.classes)
