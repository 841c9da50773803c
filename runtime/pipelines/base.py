"""What all pipelines share: how they are declared, called, stepped through and saved."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Unpack

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.errors import ConfigError, InputError
from anamorph.image import to_uint8
from anamorph.pipelines.arguments import Job
from anamorph.pipelines.cropping import put_back
from anamorph.pipelines.decoding import held_back
from anamorph.pipelines.holding import Holding
from anamorph.pipelines.opening import Opening
from anamorph.pipelines.outputs import PipelineOutput, check_output_type, finish_images
from anamorph.pipelines.running import State, finished, states
from anamorph.pipelines.sampling import Plan
from anamorph.pipelines.saving import save
from anamorph.pipelines.signature import Arguments, Signature

BLACK = {"float32": -1, "uint8": 0}
"""What a picture that is held back is filled with, by its type."""


class DiffusionPipeline(Opening, Holding):
    """Base class; `DiffusionPipeline.from_pretrained` returns the class that `model_index.json` names.

    A subclass declares as data: its components (`SLOTS`), the settings that `model_index.json` stores beside them
    (`OPTIONS`, with defaults), the arguments of a call (`TAKES`), and the part that denoises. It says in `_job` how a
    call is checked, in `plan` what the loop needs, and in `_pixels` what becomes of its latents.
    """

    TAKES: ClassVar[Signature]
    BRANCHES: ClassVar[int] = 2
    """How often each picture is in the denoiser's batch where a call is guided."""
    ALIKE: ClassVar[bool] = True
    """Whether all branches of a guided call see the same samples."""
    show_progress: bool | None = None
    """Whether a call draws a progress bar; None: only where the error stream is a terminal."""
    registry: ClassVar[dict[str, type["DiffusionPipeline"]]] = {}

    def __init_subclass__(cls, public: bool = True) -> None:
        if public:
            DiffusionPipeline.registry[cls.__name__] = cls
        if "TAKES" in vars(cls):
            cls.__call__ = cls.TAKES.announced(cls.__call__)  # type: ignore[method-assign]
            cls.steps = cls.TAKES.quiet.announced(cls.steps)  # type: ignore[method-assign]
            cls.job = cls.TAKES.quiet.announced(cls.job)  # type: ignore[method-assign]

    @classmethod
    def _class_for(
        cls, class_name: str, where: str, given: Mapping[str, Any] | None = None
    ) -> type["DiffusionPipeline"]:
        """See `Opening._class_for`."""
        del given
        if cls is not DiffusionPipeline:
            return cls
        if class_name not in cls.registry:
            raise ConfigError(
                f"{where} is a {class_name}, which this version does not have; it has {', '.join(cls.registry)}"
            )
        return cls.registry[class_name]

    def __call__(self, *positional: Any, **arguments: Unpack[Arguments]) -> Any:
        """Make pictures; arguments in diffusers' order, plus `seed`.

        Returns an object whose `.images` are Pillow images, or what `output_type` says; with `return_dict=False` a
        tuple that begins with them.

        Raises InputError: an argument is out of range or does not fit the others. Raises TypeError: a strange name.
        Raises NumericalError: a component returned NaN or infinity.
        """
        bound = self.TAKES.bind(type(self).__name__, positional, arguments)
        check_output_type(bound["output_type"])
        job = self._job(bound)
        check_output(job, bound["output_type"])
        latents = finished(self, job, bound["callback_on_step_end"], tuple(bound["callback_on_step_end_tensor_inputs"]))
        images, flags = self._finish(job, latents, bound["output_type"])
        if bound["return_dict"]:
            return PipelineOutput(images, flags)
        return (images, flags) if "safety_checker" in self.SLOTS else (images,)

    def steps(self, *positional: Any, **arguments: Unpack[Arguments]) -> Iterator[State]:
        """Generate step by step: yields a `State` after each call of the denoiser; closing it stops cleanly.

        Arguments and errors are those of a call; everything is checked before the first step runs.
        """
        return states(self, self.plan(self._bound_job(positional, arguments)))

    def job(self, *positional: Any, **arguments: Unpack[Arguments]) -> Job:
        """Check the arguments of a call and freeze them; raises InputError, or TypeError for a strange name."""
        return self._bound_job(positional, arguments)

    def _bound_job(self, positional: tuple[Any, ...], arguments: Mapping[str, Any]) -> Job:
        return self._job(self.TAKES.quiet.bind(type(self).__name__, positional, arguments))

    def generate(self, job: Job, output_type: str = "pil") -> Any:
        """Run a job that `job` made (or one rebuilt from a recorded request) and return its images."""
        check_output(job, output_type)
        return self._finish(job, finished(self, job), output_type)[0]

    def _finish(self, job: Job, latents: Array, output_type: str) -> tuple[Any, list[bool] | None]:
        """Pictures, and which of them a safety checker holds back: they are black."""
        if output_type == "latent":
            return latents, None
        pixels = self._decoded(latents, output_type)
        held = self._held_back(pixels)
        if held is not None:
            pixels = np.where(held[:, None, None, None], pixels.dtype.type(BLACK[pixels.dtype.name]), pixels)
        images, whole = finish_images(pixels, output_type), job.overlay
        if whole is not None:
            images = [put_back(i, whole.original, whole.mask, whole.box) for i in images]
        return images, None if held is None else held.tolist()

    def _held_back(self, pixels: NDArray[Any]) -> NDArray[np.bool_] | None:
        if "safety_checker" not in self._models:
            return None
        return held_back(self.program("safety_checker"), self.feature_extractor, pixels)

    def decode(self, latents: Array, output_type: str = "pil") -> Any:
        """Latents of the denoiser (or NumPy, or a tensor) to pictures, as `output_type` says; none is held back."""
        check_output_type(output_type)
        return latents if output_type == "latent" else finish_images(self._decoded(latents, output_type), output_type)

    def _decoded(self, latents: Array, output_type: str) -> NDArray[Any]:
        """Pictures in about -1..1 [N, C, H, W], or as bytes [N, H, W, C] where no more is asked for."""
        return self._bytes(latents) if output_type == "pil" else self._pixels(latents)

    def _pixels(self, latents: Array) -> NDArray[Any]:
        """Pictures in about -1..1 [N, C, H, W]."""
        raise NotImplementedError

    def _bytes(self, latents: Array) -> NDArray[Any]:
        """Pictures as bytes [N, H, W, C]."""
        return to_uint8(self._pixels(latents))

    def _job(self, call: Arguments) -> Job:
        raise NotImplementedError

    def plan(self, job: Job) -> Plan:
        """Encode texts and pictures, draw the first noise and compute the scheduler's table: all the loop needs."""
        raise NotImplementedError

    @property
    def needs(self) -> tuple[str, ...]:
        """The arguments that a call must have, because its pictures start from them."""
        return ()

    @classmethod
    def most_branches(cls, denoiser: Mapping[str, Any]) -> int:  # noqa: ARG003 - some configurations tell
        """How often each picture is in the batch of a denoiser of that configuration where a call is guided."""
        return cls.BRANCHES

    @classmethod
    def source_scale(cls, factor: int) -> int:  # noqa: ARG003 - upscalers ask
        """How many times larger pictures come out than the one that they start from; `factor` is pixels per latent."""
        return 1

    def pictures_of(self, name: str) -> int:  # noqa: ARG002 - those that follow pictures ask
        """How many pictures the argument `name` of `needs` holds for each that is drawn."""
        return 1

    def set_progress_bar_config(self, *, disable: bool = False) -> None:
        """Draw no progress bar, or again only where the error stream is a terminal."""
        self.show_progress = False if disable else None

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write the checkpoint in diffusers' layout, weights as float32 safetensors; readable by diffusers.

        `variant` is a word in the names of the weight files, beside which plain ones or others may lie.
        Raises OutputError: the disk is full or read-only. Raises InputError: this is an exported folder.
        """
        save(self, Path(folder), variant)


def check_output(job: Job, output_type: str) -> None:
    """Raise InputError where a job cannot be handed out in that form."""
    check_output_type(output_type)
    if job.overlay is not None and output_type != "pil":
        raise InputError(f"padding_mask_crop puts pictures back into Pillow images; got output_type {output_type!r}")
