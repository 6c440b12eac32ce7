"""A model's files in diffusers' layout: a folder, a hub repository, or none yet.

    unet/config.json  unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json
    vae/ or vqvae/          the first stage of a latent model
    class_embedder/         or text_encoder/ and tokenizer/: what a conditional one is told
    conversion.json         where iec-eval convert made the folder

A published model whose files are not there yet still has its structure, from ``layout``: enough to
show what a study would cost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from iec_eval import hub
from iec_eval.errors import ConfigError, CorruptFile
from iec_eval.storage import sha256

Config = dict[str, Any]
Kind = Literal["ema", "raw"]

SCHEDULER = "scheduler"
CONVERSION = "conversion.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TEXT_WEIGHTS = ("model.safetensors",)
WANTED_FROM_HUB = (
    "*.json",
    "*.txt",
    "diffusion_pytorch_model.safetensors",
    "*/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


class ModelFiles:
    """The files of one model; nothing but configurations is read here.

    Args:
        spec: a folder, or ``hub:owner/name[@revision]``.
        layout: configurations by component that stand in for files that are not there.
        kind: which weights a converted folder must hold; None accepts any.

    Raises ConfigError if there are neither files nor a layout, or the weights are of another kind.
    """

    def __init__(
        self, spec: str, layout: Mapping[str, Config] | None = None, kind: Kind | None = None
    ) -> None:
        self.spec, self._layout = spec, layout
        self._hub = hub.HubId.parse(spec)
        self.folder = Path(spec) if self._hub is None else hub.cached(self._hub)
        self.present = self._locate("unet", "config.json") is not None
        self._check_finished()
        if self.present:
            self._check_kind(kind)
        elif layout is None:
            raise ConfigError(self._not_there())

    def has(self, component: str) -> bool:
        """Whether the model has this component."""
        if not self.present:
            return component in (self._layout or {})
        return self._locate(component, _config_name(component)) is not None

    def config(self, component: str) -> Config:
        """A component's configuration.

        Raises ConfigError if it has none, CorruptFile if it cannot be read.
        """
        if not self.present and component in (self._layout or {}):
            assert self._layout is not None
            return dict(self._layout[component])
        path = self._locate(component, _config_name(component))
        if path is None:
            raise ConfigError(
                f"model {self.spec}: {component}/{_config_name(component)} not found; wanted a "
                "folder with unet/ and scheduler/, as diffusers saves a model"
            )
        return read_json(path)

    def place(self, component: str) -> Path:
        """The folder of a component.

        Raises ConfigError if it is not there.
        """
        path = self._locate(component, _config_name(component))
        if path is None:
            raise ConfigError(f"{self._not_there()} ({component}/ is missing)")
        return path.parent

    def weights(self, component: str) -> Path:
        """The weights file of a component.

        Raises ConfigError if it is not there.
        """
        names = TEXT_WEIGHTS if component == "text_encoder" else WEIGHTS
        found = (self._locate(component, name) for name in names)
        path = next((path for path in found if path is not None), None)
        if path is None:
            raise ConfigError(f"model {self.spec}: {component}/{names[0]} not found")
        return path

    def missing(self, components: Sequence[str] = ("unet", SCHEDULER)) -> list[str]:
        """What must be had before the model can run, one line each; empty if all is there."""
        if not self.present:
            return [self._not_there()]
        return [line for component in components for line in self._lacks(component)]

    def identity(self, components: Sequence[str]) -> dict[str, str]:
        """Hashes of the components' files, and which weights a converted folder holds.

        Raises ConfigError if one of them is not there.
        """
        lacking = self.missing(components)
        if lacking:
            raise ConfigError("; ".join(lacking))
        hashes = {
            f"{component}/{path.name}": sha256(path)
            for component in components
            for path in self._files(component)
        }
        kind = self.kind
        return hashes if kind is None else {**hashes, "weights": kind}

    @property
    def kind(self) -> str | None:
        """``ema`` or ``raw``, as the conversion recorded it; None where nobody did."""
        if self.folder is None or not (self.folder / CONVERSION).is_file():
            return None
        return str(read_json(self.folder / CONVERSION).get("weights"))

    def _check_finished(self) -> None:
        """A conversion that was stopped leaves a folder that looks like another model's."""
        if self.folder is None or not (self.folder / CONVERSION).is_file():
            return
        if not read_json(self.folder / CONVERSION).get("finished", True):
            raise ConfigError(
                f"model {self.spec}: its conversion was not finished; run the same iec-eval "
                "convert again"
            )

    def _check_kind(self, kind: Kind | None) -> None:
        if kind is None or self.kind == kind:
            return
        found = self.kind or f"no {CONVERSION}, which would say"
        raise ConfigError(
            f"model {self.spec}: wanted {kind} weights, found {found}; convert the checkpoint with "
            f"--weights {kind}, or leave weights: out if you know what the folder holds"
        )

    def _files(self, component: str) -> list[Path]:
        config = self._locate(component, _config_name(component))
        assert config is not None
        if component == "tokenizer":
            return sorted(path for path in config.parent.iterdir() if path.is_file())
        return [config] if component == SCHEDULER else [config, self.weights(component)]

    def _lacks(self, component: str) -> list[str]:
        name = _config_name(component)
        if self._locate(component, name) is None:
            return [f"model {self.spec}: {component}/{name} not found there"]
        if component in (SCHEDULER, "tokenizer"):
            return []
        try:
            self.weights(component)
        except ConfigError as error:
            return [str(error)]
        return []

    def _locate(self, component: str, name: str) -> Path | None:
        """A component's file: in its folder, or beside the folders for a repository of one part."""
        if self.folder is None:
            return None
        places = [self.folder / component / name]
        if component in ("unet", SCHEDULER):
            places.append(self.folder / name)
        return next((path for path in places if path.is_file()), None)

    def _not_there(self) -> str:
        if self._hub is not None:
            return (
                f"model {self.spec}: not downloaded yet; iec-eval launch does it, or "
                f"hf download {self._hub.repository}"
            )
        if self.folder is not None and self.folder.is_file():
            return (
                f"model {self.spec}: is a file, wanted a folder in diffusers' layout; make one "
                f"with iec-eval convert {self.spec} OUT"
            )
        return (
            f"model: {self.spec}/unet/config.json not found; wanted a folder with unet/ and "
            "scheduler/ (iec-eval convert makes one from an original checkpoint) or "
            "hub:owner/name"
        )


def fetch_files(spec: str) -> None:
    """Download what a hub id names, as far as it is not here; a folder is left as it is.

    Raises ConfigError if it cannot be had.
    """
    hub_id = hub.HubId.parse(spec)
    if hub_id is not None:
        hub.download(hub_id, WANTED_FROM_HUB)


def _config_name(component: str) -> str:
    names = {SCHEDULER: "scheduler_config.json", "tokenizer": "vocab.json"}
    return names.get(component, "config.json")


def read_json(path: Path) -> Config:
    """The JSON object in a file.

    Raises CorruptFile if it holds anything else.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFile(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CorruptFile(f"{path}: wanted a JSON object, got {type(values).__name__}")
    return values
