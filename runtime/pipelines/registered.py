"""Pipelines that declare nothing and register what their constructor is given, as those of others do."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anamorph.checkpoint import Checkpoint
from anamorph.components import Component
from anamorph.config import Config
from anamorph.errors import BackendError, CheckpointError, ConfigError, InputError
from anamorph.image import to_pil
from anamorph.pipelines.describing import read_component, settle_variant
from anamorph.pipelines.slots import KINDS
from anamorph.pipelines.wishes import single_wish
from anamorph.progress import Bar
from anamorph.weights import check_form, find_weights

if TYPE_CHECKING:
    from anamorph.pipelines.base import DiffusionPipeline

Pipe = TypeVar("Pipe", bound="DiffusionPipeline")
T = TypeVar("T")

PLAIN: Mapping[str, str] = {
    "CLIPTokenizer": "tokenizer", "CLIPTokenizerFast": "tokenizer", "BertTokenizer": "word pieces",
    "BertTokenizerFast": "word pieces", "CLIPImageProcessor": "processor", "CLIPFeatureExtractor": "processor",
    "DPTImageProcessor": "depth processor", "DPTFeatureExtractor": "depth processor",
}  # fmt: skip
"""Class in `model_index.json` -> the kind of a component that is no model; schedulers are known by their names' end."""


class Registering:
    """What such a pipeline may use: `register_modules` in its constructor, and helpers in its call."""

    show_progress: bool | None

    def register_modules(self, **modules: Any) -> None:
        """Keep components as attributes of these names; models are PyTorch's and run as they are."""
        self._registered.update(modules)
        for name, value in modules.items():
            setattr(self, name, value)

    @property
    def _registered(self) -> dict[str, Any]:
        registered: dict[str, Any] = vars(self).setdefault("_modules_given", {})
        return registered

    def _move_registered(self, device: Any, torch_dtype: Any) -> None:
        for module in self._registered.values():
            if isinstance(getattr(module, "config", None), Config) and hasattr(module, "parameters"):
                module.to(device=device, dtype=torch_dtype)

    def progress_bar(self, iterable: Iterable[T]) -> Iterator[T]:
        """Go through what has a length, with a progress bar where the error stream is a terminal."""
        every = list(iterable)
        with Bar(len(every), "denoising", self.show_progress) as bar:
            for one in every:
                yield one
                bar.advance()

    @staticmethod
    def numpy_to_pil(images: NDArray[Any]) -> list[Image.Image]:
        """Pictures [B, H, W, C] in 0..1 as Pillow images."""
        return to_pil(2 * np.asarray(images, np.float32).transpose(0, 3, 1, 2) - 1)


def built(
    kind: type[Pipe],
    checkpoint: Checkpoint,
    given: Mapping[str, Any],
    use_safetensors: bool | None,
    wishes: Mapping[str, Any],
) -> Pipe:
    """A pipeline whose constructor names its components, each read from the checkpoint unless it is given.

    Raises InputError: a strange component is given. Raises CheckpointError: the checkpoint lacks one.
    Raises ConfigError: one is of a class that is not served. Raises BackendError: another engine than PyTorch's is
    wished for, or the checkpoint is an exported folder.
    """
    takes = inspect.signature(kind.__init__).parameters
    wanted = {
        name: one for name, one in list(takes.items())[1:] if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }
    if strange := [name for name in given if name not in wanted]:
        raise InputError(f"{kind.__name__} has no component {', '.join(strange)}; it takes {', '.join(wanted)}")
    engine, device, precision = single_wish(wishes)
    if engine not in ("auto", "eager") or checkpoint.artifact is not None:
        raise BackendError(f"{kind.__name__} registers PyTorch's models; name a checkpoint, and leave the backend out")
    if wishes["rewrites"] is not None:
        raise InputError(f"{kind.__name__} registers PyTorch's models, which run as they are; leave rewrites out")
    if wishes["guidance_batch"] is not None:
        raise InputError(f"{kind.__name__} calls its denoiser itself; leave guidance_batch out")
    found: dict[str, Any] = {}
    for name, one in wanted.items():
        if name in given or (one.default is not one.empty and name not in checkpoint.components):
            continue
        found[name] = _read(checkpoint, name)
    models = settle_variant([value for value in found.values() if isinstance(value, Component)])
    found |= {one.name: _model(one, use_safetensors, device, precision) for one in models}
    pipe = kind(**{**found, **given})
    pipe.origin = checkpoint
    return pipe


def _read(checkpoint: Checkpoint, name: str) -> Any:
    """A component of the checkpoint, a model without its weights."""
    from anamorph.models import MODELS

    if name not in checkpoint.components:
        raise CheckpointError(f"{checkpoint.folder}/model_index.json has no {name}, which this pipeline needs")
    slot = checkpoint.components[name]
    if slot is None:
        return None
    if slot[1] in MODELS:
        return read_component(checkpoint, name, (slot[1],))
    kind = "scheduler" if slot[1].endswith("Scheduler") else PLAIN.get(slot[1])
    if kind is None:
        raise ConfigError(
            f"{name} of {checkpoint.folder} is a {slot[1]}, which this version does not have; pass {name}="
        )
    return KINDS[kind].read(checkpoint.place(name))


def _model(component: Component, use_safetensors: bool | None, device: str | None, precision: str | None) -> Any:
    import torch

    from anamorph.models import MODELS

    if use_safetensors is not None:
        check_form(find_weights(component.stored, component.stem, component.variant), use_safetensors)
    dtype = getattr(torch, precision or "float32")
    model = MODELS[component.class_name].from_pretrained(component.stored, torch_dtype=dtype, variant=component.variant)
    return model.to(device or "cpu")
