"""Writing a pipeline as a checkpoint in diffusers' layout."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.checkpoint import VERSION_WRITTEN
from anamorph.engine import Placement
from anamorph.errors import InputError
from anamorph.files import replacing
from anamorph.lora.adapting import adapting_of
from anamorph.pipelines.loaded import Loaded, Shown
from anamorph.pipelines.nets import place_of
from anamorph.pipelines.slots import library

if TYPE_CHECKING:
    from anamorph.pipelines.base import DiffusionPipeline

WRITTEN = {"ClipTokenizer": "CLIPTokenizer"}
"""Our class -> how other tools call it."""


def save(pipe: "DiffusionPipeline", place: Path, variant: str | None) -> None:
    """Write every component, weights as `variant`, and, last, `model_index.json`: a folder without it does not load.

    Raises OutputError: the disk is full or read-only. Raises InputError: a component comes from an exported folder.
    """
    components = pipe.components
    for name, value in components.items():
        if isinstance(value, Loaded) and value.component.artifact:
            raise InputError(f"{name} comes from an exported folder, which holds no weights to save; copy it")
        if isinstance(value, Loaded):
            _check_fused(name, value)
    index: dict[str, Any] = {"_class_name": type(pipe).__name__, "_diffusers_version": VERSION_WRITTEN}
    index |= {name: value for name, value in pipe.options.items() if value is not None}
    for name, value in components.items():
        if isinstance(value, Loaded):
            _model(value).save_pretrained(place / name, variant=variant)
            class_name = value.component.class_name
        elif value is not None:
            value.save_pretrained(place / name)
            class_name = WRITTEN.get(type(value).__name__, type(value).__name__)
        if place_of(pipe.SLOTS, name) == name:
            index[name] = [None, None] if value is None else [library(class_name), listed(pipe, name) or class_name]
    with replacing(place / "model_index.json") as draft:
        draft.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def listed(pipe: "DiffusionPipeline", name: str) -> str | None:
    """What an index calls the models in one place, where there are several."""
    several = len([each for each in pipe.slots if place_of(pipe.SLOTS, each) == name]) > 1
    return pipe.SLOTS[name].several if several else None


def _model(loaded: Loaded) -> Any:
    """The model that draws, where it does so in float32 and at rest; else its stored weights."""
    from anamorph.models import MODELS

    component = loaded.component
    if component.module is not None:
        return component.module
    if _draws(loaded):
        return loaded.shown.model
    return MODELS[component.class_name].from_pretrained(component.stored, variant=component.variant)


def _check_fused(name: str, loaded: Loaded) -> None:
    """Raise InputError where fused adapters would not be among the weights that are written."""
    adapting = adapting_of(loaded)
    if adapting is not None and adapting.fused and not _draws(loaded):
        raise InputError(
            f"{name} has fused adapters, which are saved where engine eager runs a checkpoint in float32; call "
            "unfuse_lora, or open the pipeline so"
        )


def _draws(loaded: Loaded) -> bool:
    """Whether the model that draws is the one to save."""
    at_rest = all(_at_rest(placed) for placed in loaded.placement.values())
    return loaded.component.module is None and isinstance(loaded.shown, Shown) and at_rest


def _at_rest(placed: Placement) -> bool:
    return placed.precision == "float32" and "offload" not in placed.details
