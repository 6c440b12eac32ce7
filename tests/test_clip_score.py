"""CLIP score against torchmetrics' own on the same tiny CLIP, and as a column of a study."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import Toy
from helpers import END, build, tiny_clip
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics.multimodal import CLIPScore

from iec_eval.errors import ConfigError, CorruptFile, Incompatible
from iec_eval.metrics import clip
from iec_eval.metrics.clip import ClipNetwork, short_name
from iec_eval.metrics.clip_score import ClipScore
from iec_eval.metrics.features import Features
from iec_eval.session import prepare
from iec_eval.storage import sha256
from iec_eval.testing import TinyModel

LIMIT = 12
COUNT = 11
WORDS = ["a cat", "a dog and a cat", "an x", "dog", "cat and dog", "y and cat"]
LONG = "a cat and a dog and a cat and a dog and a dog"


class Captioned(TinyModel):
    """The text of image i is the i-th word, in turn."""

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        super().__init__()
        self.words = words

    def captions(self, images: Sequence[int]) -> list[str]:
        return [self.words[index % len(self.words)] for index in images]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "Tiny_CLIP.v1", seed=3, limit=LIMIT)


def pictures(channels: int = 3, count: int = COUNT) -> Tensor:
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 3, 3, generator=random) * 255
    smooth = torch.nn.functional.interpolate(coarse, (24, 40), mode="bicubic")
    return smooth.clamp(0, 255).round().to(torch.uint8)


def metric_of(folder: Path, words: Sequence[str] = WORDS, count: int = COUNT) -> ClipScore:
    metric: ClipScore = build(ClipScore, {"model": str(folder)})
    metric.bind(Captioned(words))
    metric.prepare(count)
    return metric


def scores(metric: ClipScore, images: Tensor, batch: int = COUNT) -> np.ndarray:
    for indices in torch.arange(len(images)).split(batch):
        metric.update(metric.network.extract(images[indices]), indices)
    return metric.per_image().numpy()


class Version4(torch.nn.Module):
    """A CLIP whose features are tensors, as torchmetrics and transformers 4 have them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self._tensor(self.model.get_image_features(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._tensor(self.model.get_text_features(input_ids, attention_mask))

    def _tensor(self, output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output.pooler_output


def theirs(folder: Path) -> CLIPScore:
    """torchmetrics' CLIP score with the model of ``folder``, read by transformers alone."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = transformers.CLIPProcessor(
        image_processor=kind.from_pretrained(folder),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
    )
    model = Version4(transformers.CLIPModel.from_pretrained(folder).eval())
    return CLIPScore(lambda: (model, processor))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("channels", [1, 3])
def test_scores_equal_torchmetrics(folder: Path, channels: int) -> None:
    images, metric, reference = pictures(channels), metric_of(folder), theirs(folder)
    wanted = []
    for image, caption in zip(images, Captioned().captions(range(COUNT)), strict=True):
        reference.reset()
        reference.update(image.expand(3, -1, -1), caption)
        wanted.append(float(reference.compute()))
    found = scores(metric, images)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert found.max() - found.min() > 20
    assert metric.compute() == {metric.result_name: pytest.approx(np.mean(wanted), abs=1e-4)}


def test_scores_are_cut_at_zero_image_by_image(folder: Path) -> None:
    images, metric = pictures(), metric_of(folder)
    model = metric.network.extract(images).features
    texts = metric.network.embed_texts(Captioned().captions(range(COUNT)))
    flip = torch.ones(COUNT, 1)
    flip[::2] = -1
    metric.update(Features(flip * model, torch.zeros(COUNT, 0)), torch.arange(COUNT))
    cosines = (flip * model * texts).sum(1) / model.norm(dim=1) / texts.norm(dim=1)
    assert (cosines < 0).any()
    assert (cosines > 0).any()
    wanted = 100 * np.maximum(cosines.numpy(), 0)
    np.testing.assert_allclose(metric.per_image().numpy(), wanted, atol=1e-4)


def test_the_name_holds_the_model_and_its_weights(folder: Path) -> None:
    digest = sha256(folder / "model.safetensors")
    assert metric_of(folder).result_name == f"clip-score-tiny-clip-v1-{digest[:8]}"
    assert short_name("hub:openai/clip-vit-base-patch32@refs/pr/7") == "clip-vit-base-patch32"
    assert short_name(f"{folder}/../Tiny_CLIP.v1/") == "tiny-clip-v1"


def test_what_other_transformers_return_is_understood(folder: Path) -> None:
    images, metric = pictures(), metric_of(folder)
    found = scores(metric, images)
    old = metric_of(folder)
    old.network.load()
    old.network._model = Version4(old.network._model)
    np.testing.assert_array_equal(scores(old, images), found)


def test_order_and_batches_do_not_matter(folder: Path) -> None:
    images, metric = pictures(), metric_of(folder)
    found = scores(metric_of(folder), images)
    np.testing.assert_allclose(scores(metric_of(folder), images, 3), found, atol=1e-4)
    for indices in torch.randperm(COUNT, generator=torch.Generator().manual_seed(0)).split(4):
        metric.update(metric.network.extract(images[indices]), indices)
    np.testing.assert_allclose(metric.per_image().numpy(), found, atol=1e-4)


def test_captions_are_embedded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric, embedded = metric_of(folder), []
    embed = metric.network.embed_texts

    def counted(texts: Sequence[str]) -> Tensor:
        embedded.extend(texts)
        return embed(texts)

    monkeypatch.setattr(metric.network, "embed_texts", counted)
    for _ in range(2):  # two rows of a study
        scores(metric, pictures(), 4)
        metric.reset()
    assert sorted(embedded) == sorted(WORDS)


# --- long captions --------------------------------------------------------------------------------


def test_long_captions_keep_their_end_token(folder: Path) -> None:
    network = metric_of(folder, [LONG]).network
    tokens = network._tokenizer(LONG)["input_ids"]
    assert len(tokens) > LIMIT
    end = tokens[-1]
    assert network._tokenizer.convert_ids_to_tokens(end) == END
    kept = torch.tensor([[*tokens[: LIMIT - 1], end]])
    with torch.no_grad():
        output = network._loaded().get_text_features(kept, torch.ones_like(kept))
    by_hand = output if isinstance(output, Tensor) else output.pooler_output
    np.testing.assert_allclose(network.embed_texts([LONG]), by_hand, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Encountered caption longer")
def test_torchmetrics_cuts_the_end_token_off(folder: Path) -> None:
    image, metric, reference = pictures(count=1), metric_of(folder, [LONG]), theirs(folder)
    seen = []
    read = reference.model.get_text_features

    def shown(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.extend(input_ids.tolist())
        return read(input_ids, attention_mask)

    reference.model.get_text_features = shown  # type: ignore[method-assign, assignment]
    reference.update(image[0], LONG)
    end = metric.network._tokenizer(LONG)["input_ids"][-1]
    assert [len(tokens) for tokens in seen] == [LIMIT]
    assert end not in seen[0]
    assert abs(float(reference.score) - float(100 * cosine_of(metric, image))) > 0.01


def cosine_of(metric: ClipScore, image: Tensor) -> Tensor:
    picture, text = metric.network.extract(image).features, metric.network.embed_texts([LONG])
    return torch.nn.functional.cosine_similarity(picture, text)[0]


def test_truncated_captions_are_counted_and_told_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = metric_of(folder, [LONG, "a cat", "dog"])
    assert metric.protocol()["truncated_captions"] == 4  # of images 0, 3, 6 and 9
    assert metric.protocol()["token_limit"] == LIMIT
    scores(metric, pictures(), 2)  # texts come in several batches
    metric.reset()
    scores(metric, pictures(), 2)
    said = capsys.readouterr().err
    assert said.count("4 of 11 captions have more than the 12 tokens") == 1
    assert len(said.splitlines()) == 1
    short = metric_of(folder)
    scores(short, pictures())
    assert short.protocol()["truncated_captions"] == 0
    assert capsys.readouterr().err == ""


# --- what is refused ------------------------------------------------------------------------------


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_model_without_captions_is_refused(folder: Path) -> None:
    with pytest.raises(Incompatible, match="model 'tiny' has no captions"):
        build(ClipScore, {"model": str(folder)}).bind(TinyModel())


def test_missing_transformers_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "iec-eval\[text\]"'):
        metric_of(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", r"model.safetensors or model.safetensors.index.json not in"),
        ("config.json", "config.json not in"),
        ("preprocessor_config.json", "preprocessor_config.json or processor_config.json not in"),
        ("vocab.json", "tokenizer.json or vocab.json not in"),
    ],
)
def test_a_missing_file_is_named(folder: Path, tmp_path: Path, name: str, message: str) -> None:
    other = copied(folder, tmp_path / "other")
    (other / name).unlink()
    with pytest.raises(ConfigError, match=message):
        metric_of(other)


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="pickled, which could run any code"):
        metric_of(other)


def test_damaged_files_are_refused(folder: Path, tmp_path: Path) -> None:
    for number, (name, content, message) in enumerate(
        [
            ("config.json", b"{", "config.json: not readable JSON"),
            ("config.json", b"[]", "wanted an object, got list"),
            (
                "config.json",
                b'{"model_type": "bert"}',
                "wanted a CLIP model, .* describes a 'bert'",
            ),
            ("preprocessor_config.json", b"{", "its image processor cannot be read"),
            ("vocab.json", b"{", "its tokenizer cannot be read"),
            ("model.safetensors", b"no weights", "weights cannot be read"),
        ]
    ):
        other = copied(folder, tmp_path / str(number))
        (other / name).write_bytes(content)
        with pytest.raises((CorruptFile, ConfigError), match=message):
            scores(metric_of(other), pictures(count=2))


def test_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CorruptFile, match=r"missing or of another shape: visual_projection\.weight"
    ):
        scores(metric_of(other), pictures(count=2))


def test_weights_in_several_files_have_one_hash(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    halves = sorted(state)[: len(state) // 2], sorted(state)[len(state) // 2 :]
    where = {}
    for number, keys in enumerate(halves, start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, other / name, {"format": "pt"})
        where |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    metric = metric_of(other)
    np.testing.assert_array_equal(scores(metric, pictures()), scores(metric_of(folder), pictures()))
    first = metric.network.weights_hash
    assert first != ClipNetwork(str(folder)).weights_hash
    path = other / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert ClipNetwork(str(other)).weights_hash != first
    path.unlink()
    with pytest.raises(ConfigError, match=r"names model-00002-of-00002\.safetensors"):
        metric_of(other)


def test_half_precision_weights_are_computed_with_in_full(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    halved = {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    }
    save_file(halved, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    metric = metric_of(other)
    np.testing.assert_allclose(
        scores(metric, pictures()), scores(metric_of(folder), pictures()), atol=1
    )
    assert {parameter.dtype for parameter in metric.network._loaded().parameters()} == {
        torch.float32
    }


# --- the hub --------------------------------------------------------------------------------------


def test_neither_folder_nor_id_is_refused() -> None:
    for spec in ("no-such-folder", "owner/name", "/nowhere/clip"):
        with pytest.raises(ConfigError, match="no such folder; one on the Hugging Face hub is"):
            metric_of(Path(spec))
    with pytest.raises(ConfigError, match="wanted hub:owner/name"):
        metric_of(Path("hub:clip"))


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def offline(repo: str, **how: Any) -> str:
        asked.append((repo, how.get("revision"), how.get("local_files_only", False)))
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network today\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    metric = build(ClipScore, {"model": "hub:some/clip@refs/pr/3"})
    metric.bind(Captioned())
    with pytest.raises(
        ConfigError, match=r"hub:some/clip@refs/pr/3: cannot be downloaded \(no network today\)"
    ):
        metric.prepare(2)
    assert asked == [("some/clip", "refs/pr/3", True), ("some/clip", "refs/pr/3", False)]


def test_the_local_cache_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def cached(repo: str, *, local_files_only: bool = False, **_: Any) -> str:
        assert local_files_only, "asked the network"
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    network = ClipNetwork("hub:some/clip")
    assert network.folder == folder
    assert network.tag == "clip-clip"


def test_a_half_filled_cache_is_completed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def snapshot(repo: str, *, local_files_only: bool = False, **_: Any) -> str:
        return str(tmp_path if local_files_only else folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert ClipNetwork("hub:some/clip").folder == folder


def test_only_what_is_safe_is_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    there = ["model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "config.json"]
    there += ["vocab.json", "merges.txt", "tf_model.h5", "preprocessor_config.json", "README.md"]
    chosen = set(filter_repo_objects(there, allow_patterns=clip.WANTED))
    files = {"model.safetensors", "config.json", "vocab.json", "merges.txt"}
    assert chosen == files | {"preprocessor_config.json"}


# --- in a study -----------------------------------------------------------------------------------

PLUGIN = """
from iec_eval.api import hookimpl
from iec_eval.models.unet import UNet

class CaptionedUNet(UNet):
    name = "captioned-unet"

    def captions(self, images):
        return [("a cat", "dog and cat", "an x")[index % 3] for index in images]

@hookimpl
def iec_eval_models():
    return [CaptionedUNet]
"""


@pytest.fixture
def captioned_unet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the model ``captioned-unet``."""
    about = tmp_path / "site" / "captioned-1.0.dist-info"
    about.mkdir(parents=True)
    (tmp_path / "site" / "captioned.py").write_text(PLUGIN)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: captioned\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[iec_eval]\ncaptioned = captioned\n")
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_a_study_has_a_column_of_clip_scores(
    captioned_unet: None,
    folder: Path,
    toy: Toy,
    tmp_path: Path,
    write_study: Callable[..., Path],
    cli: Callable[..., Result],
) -> None:
    metrics = [{"name": "clip-score", "model": str(folder)}, *toy.metrics()]
    model = {"name": "captioned-unet", "path": str(toy.folder)}
    study = write_study(tmp_path, metrics=metrics, model=model)
    launched = cli("launch", study, "-o", tmp_path / "out")
    assert launched.exit_code == 0, launched.output
    name = f"clip-score-tiny-clip-v1-{sha256(folder / 'model.safetensors')[:8]}"
    assert f"{name} ↑" in launched.stdout
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    session = prepare(str(study), [], tmp_path / "out")
    for job, row in zip(session.jobs, first["variants"], strict=True):
        chunks = [job.folder.read_chunk(part).images for part in job.folder.finished()]
        wanted = scores(metric_of(folder, ["a cat", "dog and cat", "an x"], 10), torch.cat(chunks))
        assert row["metrics"][name]["value"] == pytest.approx(wanted.mean(), abs=1e-3)
    assert first["protocol"]["clip-score"]["truncated_captions"] == 0
    kept = list((tmp_path / "out").glob("*/features/clip-tiny-clip-v1-*/*.safetensors"))
    assert len(kept) == 9  # three rows of three files
    assert cli("evaluate", study, "-o", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == first
    without = write_study(tmp_path, metrics=metrics)
    refused = cli("show", without, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "model 'unet' has no captions" in refused.stderr
