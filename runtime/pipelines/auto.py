"""Pipelines chosen by task: the class of a checkpoint's family that draws from texts, from pictures, or in masks."""

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from anamorph import checkpoint
from anamorph.errors import ConfigError
from anamorph.pipelines.base import DiffusionPipeline
from anamorph.pipelines.nets import class_of

TASKS = ("text to image", "image to image", "inpainting")
FAMILIES: tuple[tuple[str | None, str | None, str | None], ...] = (
    ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", None),
    (
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ),
    (
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ),
    (
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
    ),
    ("StableDiffusionAdapterPipeline", None, None),
    ("StableDiffusionXLAdapterPipeline", None, None),
)
"""Names of the classes that share their components, one per entry of TASKS."""
ALONE: Mapping[str, str] = {
    "LDMTextToImagePipeline": "text to image",
    "StableDiffusionDepth2ImgPipeline": "depth",
    "StableDiffusionInstructPix2PixPipeline": "edit",
    "StableDiffusionUpscalePipeline": "upscale",
    "StableDiffusionLatentUpscalePipeline": "upscale",
    "DDPMPipeline": "unconditional",
    "DDIMPipeline": "unconditional",
    "DiTPipeline": "class",
}
"""Names of the classes that share their components with no other, and what they do."""


def tasks_of_class(class_name: str) -> dict[str, str]:
    """What checkpoints of that class may serve -> the class that serves it."""
    family = next((names for names in FAMILIES if class_name in names), None)
    if family is not None:
        return {task: name for task, name in zip(TASKS, family, strict=True) if name is not None}
    return {ALONE[class_name]: class_name} if class_name in ALONE else {}


WITH: Mapping[str, str] = {
    "ControlNetModel": "ControlNet", "ControlNetUnionModel": "ControlNetUnion", "T2IAdapter": "Adapter",
}  # fmt: skip
"""Class of nets -> what stands for them in the name of a pipeline's class."""


def with_nets(class_name: str, net: str) -> str:
    """The class that does the same along pictures, by nets of the class `net`; raises ConfigError: there is none."""
    plain = without_nets(class_name)
    base, task = next(
        ((plain.removesuffix(ending), ending) for ending in ("Img2ImgPipeline", "InpaintPipeline", "Pipeline")
         if plain.endswith(ending)), (plain, ""),
    )  # fmt: skip
    name = f"{base}{WITH.get(net, net)}{task}"
    if name in DiffusionPipeline.registry:
        return name
    raise ConfigError(f"there is no pipeline that does what {class_name} does with a {net}")


def without_nets(class_name: str) -> str:
    """The class that does the same along no picture."""
    name = class_name
    for stands in ("ControlNetUnion", "ControlNet", "Adapter"):
        name = name.replace(stands, "")
    return name if name in DiffusionPipeline.registry else class_name


class AutoPipeline(DiffusionPipeline, public=False):
    """Base of the three below; a subclass says which of TASKS it is for."""

    WHICH: ClassVar[int]

    def __init__(self, *_: Any, **__: Any) -> None:
        _refuse(type(self).__name__)

    @classmethod
    def _class_for(cls, class_name: str, where: str, given: Mapping[str, Any] | None = None) -> type[DiffusionPipeline]:
        name = tasks_of_class(class_name).get(TASKS[cls.WHICH]) if class_name not in ALONE else None
        if name is not None:
            for place in {checkpoint.ALONE[net] for net in WITH} & set(given or {}):
                net = (given or {})[place]
                name = without_nets(name) if net is None else with_nets(name, class_of(net))
            return cls.registry[name]
        raise ConfigError(f"{where} is a {class_name}, for which there is no pipeline for {TASKS[cls.WHICH]}")


def _refuse(name: str) -> NoReturn:
    raise TypeError(f"{name} chooses a class and is none itself; call its from_pretrained or from_pipe")


class AutoPipelineForText2Image(AutoPipeline, public=False):
    """`from_pretrained` and `from_pipe` give the pipeline of the checkpoint's family that draws from texts."""

    WHICH = 0


class AutoPipelineForImage2Image(AutoPipeline, public=False):
    """`from_pretrained` and `from_pipe` give the pipeline of the checkpoint's family that draws from pictures."""

    WHICH = 1


class AutoPipelineForInpainting(AutoPipeline, public=False):
    """`from_pretrained` and `from_pipe` give the pipeline of the checkpoint's family that draws in masks."""

    WHICH = 2
