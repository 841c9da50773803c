"""The components of a pipeline: taken, opened, shown under their names, replaced and moved."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from anamorph.checkpoint import Checkpoint
from anamorph.clip_image import CLIPImageProcessor
from anamorph.engine import Placement, Program
from anamorph.errors import InputError
from anamorph.lora.adapting import Open, adapting_of, moved, scaled
from anamorph.memory import JOINT
from anamorph.native import preparing, shallow
from anamorph.pipelines.adopting import as_component
from anamorph.pipelines.denoiser import Denoiser, Opened
from anamorph.pipelines.loaded import Loaded
from anamorph.pipelines.loading import Ready, completed, open_all, ready
from anamorph.pipelines.nets import filled, several_of, spread, unpacked
from anamorph.pipelines.registered import Registering
from anamorph.pipelines.saving_memory import SavingMemory, check_resident
from anamorph.pipelines.slots import Slots, check_given, models, parts_of
from anamorph.pipelines.wishes import Given, Wishes
from anamorph.rewrites import NOTE, Wish, check_met
from anamorph.schedulers import Scheduler

log = logging.getLogger(__name__)


class Holding(SavingMemory, Registering):
    """What `DiffusionPipeline` knows of its components; see there for what a subclass declares."""

    SLOTS: ClassVar[Slots] = {}
    OPTIONS: ClassVar[Mapping[str, Any]] = {}
    DENOISER: ClassVar[str] = "unet"
    scheduler: Scheduler
    feature_extractor: CLIPImageProcessor

    def __init__(
        self,
        *components: Any,
        backend: str | Mapping[str, str] = "auto",
        device: Any = None,
        torch_dtype: Any = None,
        rewrites: Wish = None,
        backend_options: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        guidance_batch: str | None = None,
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
        self._given = Given(backend, device, torch_dtype, rewrites, backend_options, trust_remote_code, guidance_batch)
        self._models: dict[str, Loaded] = {}
        for name, slot in self.slots.items():
            value = given.get(name)
            if slot.kind != "model":
                setattr(self, name, value)
        filling = [name for name in models(self.slots) if given.get(name) is not None]
        self._models = open_all({name: self._ready(name, given[name]) for name in filling})
        self._check_rewrites()
        if "safety_checker" in self._models and self.feature_extractor is None:
            raise InputError("a safety_checker without a feature_extractor; pass both, or safety_checker=None")
        if self.options.get("requires_safety_checker") and "safety_checker" not in self._models:
            log.warning("this checkpoint asks for a safety checker and has none here: pictures are not screened")

    def _open(self, name: str, value: Any) -> Loaded:
        return open_all({name: self._ready(name, value)})[name]

    def _ready(self, name: str, value: Any) -> Ready | Loaded:
        slot = self.slots[name]
        refining = bool(self.options.get("requires_aesthetics_score"))
        component = as_component(name, value, slot.classes, refining, self._models.get(name))
        if isinstance(component, Loaded):
            return completed(component.placed(name), self._parts(name), self._wishes)
        return ready(component, self._parts(name), self._wishes, slot.wide, name)

    def _parts(self, name: str) -> list[str]:
        return [part for part, owner in parts_of(self.slots).items() if owner == name]

    @property
    def _wishes(self) -> Wishes:
        return Wishes.of(self._given, [*models(self.slots), *parts_of(self.slots)])

    def _opener(self, name: str) -> Open:
        """How a component is opened as this pipeline does now, for other adapters."""
        parts, wishes, wide = self._parts(name), self._wishes, self.slots[name].wide
        return lambda component: ready(component, parts, wishes, wide, name).open().programs

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

    @property
    def guidance_batch(self) -> str:
        """Whether branches of guidance share a call of the denoiser, "joint", or have one each, "apart".

        As was asked for, or measured to be faster; else they share it.
        """
        profile = self._models[self.DENOISER].profile
        return self._given.guidance_batch or (None if profile is None else profile.guidance_batch) or JOINT

    def _config(self, name: str) -> Any:
        return self._models[name].config

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

    def __repr__(self) -> str:
        lines = [f"  {placement}" for placement in self.placement.values()]
        others = (name for name, slot in self.SLOTS.items() if slot.kind == "scheduler")
        lines += [f"  {name}: {type(getattr(self, name)).__name__}" for name in (*others, *self._registered)]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])
