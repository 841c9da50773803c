"""The models of a checkpoint as components, without reading their weights."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from anamorph.artifact import Artifact
from anamorph.checkpoint import Checkpoint, Source, component_config, open_checkpoint
from anamorph.components import Component
from anamorph.errors import ArtifactError, CheckpointError, ConfigError, InputError
from anamorph.model_interfaces import interfaces
from anamorph.weights import find_weights

log = logging.getLogger(__name__)


def alone(source: str | Path, class_names: Sequence[str]) -> Component:
    """The only model of a folder or hub id, of a checkpoint or exported; raises ConfigError: one of another class."""
    opened = open_checkpoint(Source(str(source)))
    if opened.class_name not in class_names:
        raise ConfigError(f"{opened.folder} is a {opened.class_name}, expected {' or '.join(class_names)}")
    return read_component(opened, next(iter(opened.components)), class_names)


def read_component(checkpoint: Checkpoint, name: str, class_names: Sequence[str]) -> Component:
    """Describe a model of a checkpoint without reading its weights.

    Raises CheckpointError: the slot is empty. Raises ConfigError: its class is not one that the pipeline takes.
    """
    slot = checkpoint.components.get(name)
    if slot is None:
        raise CheckpointError(f"{checkpoint.folder}/model_index.json has no {name}; this pipeline needs one")
    if slot[1] not in class_names:
        raise ConfigError(f"{name} of {checkpoint.folder} is a {slot[1]}, expected {' or '.join(class_names)}")
    interfaces(slot[1], name, checkpoint.refining)
    folder = checkpoint.place(name) if checkpoint.artifact is None else _exported_folder(checkpoint.artifact, name)
    return Component(
        name, slot[1], component_config(folder), folder, checkpoint.variant, checkpoint=checkpoint,
        refining=checkpoint.refining,
    )  # fmt: skip


def _exported_folder(artifact: Artifact, name: str) -> Path:
    for part, record in artifact.parts.items():
        if record.component == name:
            return artifact.folder / part
    raise ArtifactError(f"{artifact.folder} holds no part of {name}; export the checkpoint again")


def settle_variant(components: Sequence[Component]) -> list[Component]:
    """Let components without files of the wished variant use their plain ones, as diffusers does.

    Raises CheckpointError: no component has the variant.
    """
    variant = next((component.variant for component in components if component.variant), None)
    if variant is not None and components[0].artifact is not None:
        raise InputError(
            f"variant {variant!r} names weights of a checkpoint; an exported folder holds one kind of weights"
        )
    if variant is None:
        return list(components)
    having = [component for component in components if _has_variant(component)]
    if not having:
        raise CheckpointError(f"no component has weights of variant {variant!r}; leave it out to load the plain ones")
    settled = [c if c in having else replace(c, variant=None) for c in components]
    if lost := [component.name for component in settled if not _has_variant(component)]:
        raise CheckpointError(
            f"{', '.join(lost)} has neither weights of variant {variant!r} nor plain ones; name a variant that all have"
        )
    if plain := [component.name for component in components if component not in having]:
        log.info("variant %s: not stored for %s, which load their plain weights", variant, ", ".join(plain))
    return settled


def _has_variant(component: Component) -> bool:
    """Whether the component has weights of the variant that it wishes (None: plain ones)."""
    if component.folder is None:
        return False
    try:
        find_weights(component.folder, component.stem, component.variant)
    except CheckpointError:
        return False
    return True
