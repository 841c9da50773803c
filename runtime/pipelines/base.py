"""What all pipelines share: their components, loading, saving and placement."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import Array
from anamorph.checkpoint import Checkpoint
from anamorph.clip_image import CLIPImageProcessor
from anamorph.engine import Placement, Program
from anamorph.errors import ConfigError, InputError
from anamorph.image import to_uint8
from anamorph.lora.adapting import Open, adapting_of, moved, scaled
from anamorph.native import preparing, shallow
from anamorph.pipelines.arguments import Job
from anamorph.pipelines.cropping import put_back
from anamorph.pipelines.decoding import held_back
from anamorph.pipelines.denoiser import Denoiser, Opened
from anamorph.pipelines.loaded import Loaded
from anamorph.pipelines.loading import Given, Wishes, as_component, completed, open_component
from anamorph.pipelines.nets import filled, several_of, spread, unpacked
from anamorph.pipelines.opening import Opening
from anamorph.pipelines.outputs import PipelineOutput, check_output_type, finish_images
from anamorph.pipelines.registered import Registering
from anamorph.pipelines.running import State, finished, states
from anamorph.pipelines.sampling import Plan
from anamorph.pipelines.saving import save
from anamorph.pipelines.saving_memory import SavingMemory, check_resident
from anamorph.pipelines.signature import Arguments, Signature
from anamorph.pipelines.slots import Slots, check_given, models, parts_of
from anamorph.rewrites import NOTE, Wish, check_met
from anamorph.schedulers import Scheduler

log = logging.getLogger(__name__)

BLACK = {"float32": -1, "uint8": 0}
"""What a picture that is held back is filled with, by its type."""


class DiffusionPipeline(Opening, SavingMemory, Registering):
    """Base class; `DiffusionPipeline.from_pretrained` returns the class that `model_index.json` names.

    A subclass declares as data: its components (`SLOTS`), the settings that `model_index.json` stores beside them
    (`OPTIONS`, with defaults), the arguments of a call (`TAKES`), and the part that denoises. It says in `_job` how a
    call is checked, in `plan` what the loop needs, and in `_pixels` what becomes of its latents.
    """

    SLOTS: ClassVar[Slots] = {}
    OPTIONS: ClassVar[Mapping[str, Any]] = {}
    TAKES: ClassVar[Signature]
    DENOISER: ClassVar[str] = "unet"
    BRANCHES: ClassVar[int] = 2
    """How often each picture is in the denoiser's batch where a call is guided."""
    ALIKE: ClassVar[bool] = True
    """Whether all branches of a guided call see the same samples."""
    show_progress: bool | None = None
    """Whether a call draws a progress bar; None: only where the error stream is a terminal."""
    registry: ClassVar[dict[str, type["DiffusionPipeline"]]] = {}
    scheduler: Scheduler
    feature_extractor: CLIPImageProcessor

    def __init_subclass__(cls, public: bool = True) -> None:
        if public:
            DiffusionPipeline.registry[cls.__name__] = cls
        if "TAKES" in vars(cls):
            cls.__call__ = cls.TAKES.announced(cls.__call__)  # type: ignore[method-assign]
            cls.steps = cls.TAKES.quiet.announced(cls.steps)  # type: ignore[method-assign]
            cls.job = cls.TAKES.quiet.announced(cls.job)  # type: ignore[method-assign]

    def __init__(
        self,
        *components: Any,
        backend: str | Mapping[str, str] = "auto",
        device: Any = None,
        torch_dtype: Any = None,
        rewrites: Wish = None,
        backend_options: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        origin: Checkpoint | None = None,
        **named: Any,
    ) -> None:
        """Take components, by name or in diffusers' order, and settings by name; models of anamorph, or opened ones.

        Raises InputError: one is missing, strange or of another kind. Raises ConfigError: they do not fit together.
        """
        given = unpacked(self.SLOTS, {**dict(zip(self.SLOTS, components, strict=False)), **named})
        self.slots = spread(self.SLOTS, given)
        check_given(type(self).__name__, self.slots, tuple(self.OPTIONS), given)
        if missing := [name for name, slot in self.SLOTS.items() if not slot.optional and name not in given]:
            raise InputError(f"{type(self).__name__} needs {', '.join(missing)}; pass every component")
        self.origin = origin
        self.options = {name: given.get(name, default) for name, default in self.OPTIONS.items()}
        self._given = Given(backend, device, torch_dtype, rewrites, backend_options, trust_remote_code)
        self._models: dict[str, Loaded] = {}
        for name, slot in self.slots.items():
            value = given.get(name)
            if slot.kind != "model":
                setattr(self, name, value)
            elif value is not None:
                self._models[name] = self._open(name, value)
        self._check_rewrites()
        if "safety_checker" in self._models and self.feature_extractor is None:
            raise InputError("a safety_checker without a feature_extractor; pass both, or safety_checker=None")
        if self.options.get("requires_safety_checker") and "safety_checker" not in self._models:
            log.warning("this checkpoint asks for a safety checker and has none here: pictures are not screened")

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

    def _open(self, name: str, value: Any) -> Loaded:
        slot = self.slots[name]
        refining = bool(self.options.get("requires_aesthetics_score"))
        component = as_component(name, value, slot.classes, refining, self._models.get(name))
        if isinstance(component, Loaded):
            return completed(component.placed(name), self._parts(name), self._wishes)
        return open_component(component, self._parts(name), self._wishes, slot.wide, name)

    def _parts(self, name: str) -> list[str]:
        return [part for part, owner in parts_of(self.slots).items() if owner == name]

    @property
    def _wishes(self) -> Wishes:
        return Wishes.of(self._given, [*models(self.slots), *parts_of(self.slots)])

    def _opener(self, name: str) -> Open:
        """How a component is opened as this pipeline does now, for other adapters."""
        parts, wishes, wide = self._parts(name), self._wishes, self.slots[name].wide
        return lambda component: open_component(component, parts, wishes, wide, name).programs

    def _check_rewrites(self) -> None:
        """Raise InputError where a rewrite that was wished for by its name is not in force."""
        placed = self.placement.values()
        applied = [name for one in placed for name in one.details.get(NOTE, "").split()]
        parts = [(part, one.component.class_name, one.config) for one in self._models.values() for part in one.programs]
        check_met(self._given.rewrites, applied, parts)

    def __getattr__(self, name: str) -> Any:
        """A model by its name, which may be a component of another pipeline; None where its place is empty.

        That is the PyTorch model with its layers, where PyTorch runs it, and else the opened component.
        """
        if name in models(type(self).SLOTS) and "_models" in vars(self):
            shown = [self._models[each].shown for each in filled(type(self).SLOTS, name, self._models)]
            return several_of(type(self).SLOTS[name].several, shown) if len(shown) > 1 else next(iter(shown), None)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """A model in a place of this pipeline is opened, like one that the constructor is given; None empties it."""
        if name in models(type(self).SLOTS):
            given = unpacked(self.SLOTS, {name: value})
            self.slots = spread(self.SLOTS, [*self._models, *given])
            opened = {each: self._open(each, one) for each, one in given.items()
                      if one is not None or not self.slots[each].optional}  # fmt: skip
            for stale in filled(self.SLOTS, name, self._models):
                del self._models[stale]
            self._models |= opened
            self.slots = spread(self.SLOTS, self._models)
        else:
            super().__setattr__(name, value)

    # ---- a call --------------------------------------------------------------------------------------------------

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

    def program(self, part: str, scale: float = 1.0) -> Program:
        """The opened part of that name, in whose calls adapters count `scale` times."""
        found = next(loaded.programs[part] for loaded in self._models.values() if part in loaded.programs)
        return scaled(found, scale)

    def denoiser(self, slot: str | None = None, scale: float = 1.0) -> Denoiser:
        """What predicts in the loop, for one thread: the model of that slot, or of the one that denoises."""
        slot = slot or self.DENOISER
        every = {part: scaled(program, scale) for part, program in self._models[slot].programs.items()}
        return Opened.of(every[slot], every.get(preparing(slot)), every.get(shallow(slot)))

    @property
    def rewrites(self) -> Wish:
        """The rewrites that were asked for, or measured to be best; None: those that are on by themselves."""
        profile = self._models[self.DENOISER].profile
        return self._given.rewrites or (None if profile is None else profile.rewrites or None)

    def _config(self, name: str) -> Any:
        return self._models[name].config

    # ---- where it runs, and what it is made of -------------------------------------------------------------------

    def set_progress_bar_config(self, *, disable: bool = False) -> None:
        """Draw no progress bar, or again only where the error stream is a terminal."""
        self.show_progress = False if disable else None

    def to(self, device: Any = None, torch_dtype: Any = None) -> Self:
        """Open the models again on another device or in another precision; returns the pipeline itself."""
        old = self._given
        self._given = replace(old, device=device or old.device, torch_dtype=torch_dtype or old.torch_dtype)
        check_resident(list(self._models.values()))
        self._move_registered(device, torch_dtype)
        self._models = {name: self._moved(name, loaded) for name, loaded in self._models.items()}
        return self

    def _moved(self, name: str, loaded: Loaded) -> Loaded:
        opened = replace(self._open(name, loaded.component), sparing=loaded.sparing, adapters=loaded.adapters)
        adapting = adapting_of(loaded)
        return opened if adapting is None else moved(opened, adapting, self._opener(name))

    @property
    def components(self) -> dict[str, Any]:
        """All components by name, None where one is absent; another pipeline built from them shares their weights."""
        declared = {name: self._models.get(name) if slot.kind == "model" else getattr(self, name)
                    for name, slot in self.slots.items()}  # fmt: skip
        return {**declared, **self._registered}

    @property
    def placement(self) -> dict[str, Placement]:
        """Part name -> engine, device and precision that really run it."""
        return {part: placed for loaded in self._models.values() for part, placed in loaded.placement.items()}

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write the checkpoint in diffusers' layout, weights as float32 safetensors; readable by diffusers.

        `variant` is a word in the names of the weight files, beside which plain ones or others may lie.
        Raises OutputError: the disk is full or read-only. Raises InputError: this is an exported folder.
        """
        save(self, Path(folder), variant)

    def __repr__(self) -> str:
        lines = [f"  {placement}" for placement in self.placement.values()]
        others = (name for name, slot in self.SLOTS.items() if slot.kind == "scheduler")
        lines += [f"  {name}: {type(getattr(self, name)).__name__}" for name in (*others, *self._registered)]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])


def check_output(job: Job, output_type: str) -> None:
    """Raise InputError where a job cannot be handed out in that form."""
    check_output_type(output_type)
    if job.overlay is not None and output_type != "pil":
        raise InputError(f"padding_mask_crop puts pictures back into Pillow images; got output_type {output_type!r}")
