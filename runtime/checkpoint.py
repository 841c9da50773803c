"""A checkpoint in diffusers' layout: a local folder or a hub id, and what its `model_index.json` says."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anamorph.artifact import Artifact, is_artifact, read_artifact
from anamorph.config import Config, read_json
from anamorph.digests import digest
from anamorph.errors import CheckpointError
from anamorph.hub import Source, find_folder

__all__ = [
    "BUNDLED", "BUNDLED_GUIDANCE", "BUNDLED_NAME", "LATER_KEYS", "VERSION_WRITTEN", "Checkpoint", "Source",
    "component_config", "model_named", "open_checkpoint",
]  # fmt: skip

log = logging.getLogger(__name__)

VERSION_WRITTEN = "0.42.1"
"""The version of diffusers whose layout is written."""
LATER_KEYS: Mapping[str, Mapping[str, Any]] = {
    "AutoencoderKL": {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None,
                      "force_upcast": True, "use_quant_conv": True, "use_post_quant_conv": True,
                      "mid_block_add_attention": True},
    "UNet2DConditionModel": {"addition_embed_type": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
                             "class_embed_type": None, "time_cond_proj_dim": None},
    "ControlNetModel": {"conditioning_channels": 3, "mid_block_type": "UNetMidBlock2DCrossAttn",
                        "transformer_layers_per_block": 1, "addition_embed_type": None, "encoder_hid_dim": None},
}  # fmt: skip
"""Class -> keys that its first files lack, which the first Stable Diffusion's checkpoints are, and their defaults."""
SEVERAL: Mapping[str, str] = {
    "MultiControlNetModel": "ControlNetModel", "MultiControlNetUnionModel": "ControlNetUnionModel",
    "MultiAdapter": "T2IAdapter",
}  # fmt: skip
"""What an index calls several models in one place, which lie in folders with numbers behind its name -> their class."""
ALONE: Mapping[str, str] = {
    "ControlNetModel": "controlnet", "ControlNetUnionModel": "controlnet", "T2IAdapter": "adapter",
    "CLIPVisionModelWithProjection": "image_encoder",
}  # fmt: skip
"""Classes of models that come in folders of their own -> their place in a pipeline."""
BUNDLED = Path(__file__).parent / "data" / "emoji"
"""The model that ships with the package."""
BUNDLED_NAME = "bundled"
"""What it is called in commands and in results."""
BUNDLED_GUIDANCE = 4.0
"""The guidance scale that it draws best with."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: `components` maps a name to its library and class, None where the slot is empty.

    `artifact` is there where the folder was exported for an engine and holds no weights of ours.
    """

    folder: Path
    class_name: str
    components: Mapping[str, tuple[str, str] | None]
    settings: Mapping[str, Any]
    variant: str | None = None
    artifact: Artifact | None = None

    @property
    def refining(self) -> bool:
        """Whether it is a refiner of SDXL's kind, whose denoiser is told an aesthetic score instead of a size."""
        return bool(self.settings.get("requires_aesthetics_score"))

    @property
    def flat(self) -> bool:
        """Whether a denoiser's and a scheduler's files lie side by side, without subfolders."""
        inside = any((self.folder / component).is_dir() for component in self.components)
        return not inside and (self.folder / "config.json").is_file()

    def place(self, component: str) -> Path:
        """The component's subfolder; the folder itself where all files lie side by side, as DDPM's first ones do.

        Raises CheckpointError: it is missing.
        """
        place = self.folder / component
        if self.flat:
            return self.folder
        if not place.is_dir():
            raise CheckpointError(f"{self.folder} has no folder {component!r}, which its model_index.json lists")
        return place

    def digest(self) -> str:
        """SHA-256 over names and bytes of all weight files below the folder, hexadecimal; an artifact's source's."""
        if self.artifact is not None:
            return self.artifact.source["sha256"]
        total = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            if path.suffix in (".safetensors", ".bin"):
                total.update(path.relative_to(self.folder).as_posix().encode() + bytes.fromhex(digest(path)))
        return total.hexdigest()


def model_named(argument: str | None) -> str:
    """What an argument of a command names: the bundled model by its name or by none, else the argument itself."""
    return str(BUNDLED) if argument is None or argument == BUNDLED_NAME else argument


def open_checkpoint(source: Source, made_from: Path | None = None) -> Checkpoint:
    """Find the folder (downloading a hub id into its cache) and read its `model_index.json`.

    `made_from` is where the checkpoint of an artifact lies now, if not where it lay when it was exported.

    Raises CheckpointError: no such folder or id, or the index is missing or malformed.
    Raises ArtifactError: the folder is an artifact that is damaged, incomplete or of a newer schema.
    Raises ConfigError: it was exported by another tool, from a model that is not served.
    """
    folder = find_folder(source)
    index = folder / "model_index.json"
    if not index.is_file() and (lone := _lone(folder, source, made_from)) is not None:
        return lone
    if not index.is_file():
        raise CheckpointError(f"{folder} has no model_index.json; name a checkpoint folder in diffusers' layout")
    values = read_json(index)
    if not isinstance(class_name := values.get("_class_name"), str):
        raise CheckpointError(f"{index} does not name its pipeline (_class_name); download it again")
    components: dict[str, tuple[str, str] | None] = {}
    settings: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2 and key.isidentifier():
            components |= _listed(folder, key, str(value[0]), str(value[1])) if all(value) else {key: None}
        else:
            settings[key] = value
    artifact = read_artifact(folder, made_from) if is_artifact(folder) else None
    opened = Checkpoint(folder, class_name, components, settings, source.variant, artifact)
    return opened if artifact is not None else _as_foreign(opened)


def _lone(folder: Path, source: Source, made_from: Path | None) -> Checkpoint | None:
    """A folder that holds a single model, as ControlNets and adapters come, or None."""
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else {}
    listed = values.get("architectures")  # where transformers names the class
    name = str(listed[0] if isinstance(listed, list) and listed else values.get("_class_name"))
    if name not in ALONE:
        return None
    artifact = read_artifact(folder, made_from) if is_artifact(folder) else None
    return Checkpoint(folder, name, {ALONE[name]: ("diffusers", name)}, {}, source.variant, artifact)


def numbered(place: Path) -> Iterator[Path]:
    """`place` and, as long as they are there, `place`_1, `place`_2, ..."""
    yield place
    index = 1
    while (following := place.with_name(f"{place.name}_{index}")).is_dir():
        yield following
        index += 1


def _listed(folder: Path, name: str, library: str, class_name: str) -> dict[str, tuple[str, str]]:
    """An entry of an index; several models in one place become one entry each."""
    if class_name not in SEVERAL:
        return {name: (library, class_name)}
    return {place.name: (library, SEVERAL[class_name]) for place in numbered(folder / name)}


def _as_foreign(opened: Checkpoint) -> Checkpoint:
    """The same with an artifact where another tool has exported the folder."""
    from anamorph.foreign import foreign_format, pipeline_class, read_foreign  # it needs what stands here

    if (form := foreign_format(opened.folder)) is None:
        return opened
    artifact = read_foreign(opened, form)
    log.info("%s: %s", opened.folder, artifact.image["status"])
    return replace(opened, class_name=pipeline_class(opened.class_name), artifact=artifact)


def component_config(folder: Path) -> Config:
    """The `config.json` of a component's folder, with what it meant before some of its keys existed."""
    values = read_json(folder / "config.json")
    return Config({**LATER_KEYS.get(str(values.get("_class_name")), {}), **values})
