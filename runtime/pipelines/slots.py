"""The components of a pipeline as it declares them: what may fill each place, and how it is found in a checkpoint."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from anamorph.bert_tokenizer import BertTokenizer
from anamorph.checkpoint import Checkpoint
from anamorph.clip_image import CLIPImageProcessor, DPTImageProcessor
from anamorph.errors import CheckpointError, ConfigError, InputError
from anamorph.pipelines.describing import read_component
from anamorph.schedulers import Scheduler
from anamorph.schedulers.registry import scheduler_from_folder
from anamorph.tokenizer import ClipTokenizer

log = logging.getLogger(__name__)

Tokenizer = ClipTokenizer | BertTokenizer


@dataclass(frozen=True)
class Kind:
    """A component that is no model: how it is read from its folder, what it is here, and how that is called."""

    read: Callable[[Path], Any]
    type: type
    called: str


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "tokenizer": Kind(ClipTokenizer.from_pretrained, ClipTokenizer, "anamorph.ClipTokenizer"),
        "word pieces": Kind(BertTokenizer.from_pretrained, BertTokenizer, "anamorph.BertTokenizer"),
        "scheduler": Kind(scheduler_from_folder, Scheduler, "a scheduler of anamorph"),
        "processor": Kind(CLIPImageProcessor.from_pretrained, CLIPImageProcessor, "anamorph.CLIPImageProcessor"),
        "depth processor": Kind(DPTImageProcessor.from_pretrained, DPTImageProcessor, "anamorph.DPTImageProcessor"),
    }
)


@dataclass(frozen=True)
class Slot:
    """One component: its `kind` ("model", "unused", or a key of `KINDS`) and whether it may stay empty.

    For a model: the `classes` that may fill it, the `parts` that are opened, in which {slot} stands for its name (none:
    the one that is named as the slot), whether it is kept out of float16, where its values overflow (`wide`), and how
    checkpoints call `several` in its place (None: there is but one). An unused slot stays empty: checkpoints have it,
    and no pipeline of this version runs it.
    """

    kind: str
    classes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    optional: bool = False
    wide: bool = False
    several: str | None = None


def model(
    *classes: str, parts: tuple[str, ...] = (), optional: bool = False, wide: bool = False, several: str | None = None
) -> Slot:
    """A slot for one of our models."""
    return Slot("model", classes, parts, optional, wide, several)


TOKENIZER = Slot("tokenizer")
WORD_PIECES = Slot("word pieces")
SCHEDULER = Slot("scheduler")
PROCESSOR = Slot("processor", optional=True)
"""How pictures are prepared for a safety checker."""
DEPTH_PROCESSOR = Slot("depth processor", optional=True)
"""How pictures are prepared for a depth estimator."""
IMAGE_ENCODER = model("CLIPVisionModelWithProjection", optional=True)
"""What encodes pictures that are prompts."""
UNUSED = Slot("unused", optional=True)

Slots = Mapping[str, Slot]
"""Name -> slot, in the order of diffusers' constructor."""


def models(slots: Slots) -> dict[str, Slot]:
    """The slots that hold models."""
    return {name: slot for name, slot in slots.items() if slot.kind == "model"}


def parts_of(slots: Slots) -> dict[str, str]:
    """Part -> slot, of everything that engines open."""
    every = ((part.format(slot=name), name) for name, slot in models(slots).items() for part in slot.parts or (name,))
    return dict(every)


def read_slot(checkpoint: Checkpoint, name: str, slot: Slot) -> Any:
    """What fills a slot, models without their weights; None where an optional one is empty.

    Raises CheckpointError: it is empty, or files are missing. Raises ConfigError: it holds what is not served.
    """
    if slot.kind == "unused" or (slot.optional and checkpoint.components.get(name) is None):
        return None
    if slot.kind == "model" and slot.optional and not _exported(checkpoint, name):
        log.warning("%s was exported without its %s; it takes no part", checkpoint.folder, name)
        return None
    if slot.kind == "model":
        return read_component(checkpoint, name, slot.classes)
    if name in checkpoint.components and checkpoint.components[name] is None:
        raise CheckpointError(f"{checkpoint.folder}/model_index.json has no {name}; this pipeline needs one")
    return KINDS[slot.kind].read(checkpoint.place(name))


def _exported(checkpoint: Checkpoint, name: str) -> bool:
    artifact = checkpoint.artifact
    return artifact is None or any(part.component == name for part in artifact.parts.values())


def check_given(owner: str, slots: Slots, options: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raise InputError where a caller's component has a strange name or kind; models are looked at when opened."""
    for name, value in given.items():
        if name in options:
            continue
        if name not in slots:
            known = ", ".join((*slots, *options))
            raise InputError(f"{owner} has no component or argument {name!r}; it takes {known}")
        slot = slots[name]
        if value is None:
            if not slot.optional:
                raise InputError(f"{name} is None, but {owner} needs one; leave it out to take the checkpoint's")
        elif slot.kind == "unused":
            raise InputError(f"{name} cannot be run by this version; pass {name}=None or leave it out")
        elif slot.kind != "model" and not isinstance(value, KINDS[slot.kind].type):
            raise InputError(f"{name} is a {type(value).__name__}, expected {KINDS[slot.kind].called}")


def check_slots(owner: str, slots: Slots, checkpoint: Checkpoint) -> None:
    """Raise ConfigError where the checkpoint fills a slot that the pipeline does not have."""
    filled = [name for name, slot in checkpoint.components.items() if slot is not None]
    if strange := [name for name in filled if name not in slots]:
        raise ConfigError(
            f"{checkpoint.folder} has {', '.join(strange)}, which {owner} does not take; it takes {', '.join(slots)}"
        )


FOREIGN = ("CLIP", "DPT", "Bert")
"""How the names of transformers' classes begin."""


def library(class_name: str) -> str:
    """The package, or the family of pipelines, that diffusers' index names for a class."""
    families = {"StableDiffusionSafetyChecker": "stable_diffusion", "LDMBertModel": "latent_diffusion"}
    return families.get(class_name) or ("transformers" if class_name.startswith(FOREIGN) else "diffusers")
