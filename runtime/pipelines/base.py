"""What all pipelines share: loading, saving, placement, and turning a plan into pictures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from anamorph.checkpoint import VERSION_WRITTEN, Checkpoint, Source, open_checkpoint
from anamorph.components import Component
from anamorph.engine import Placement
from anamorph.errors import ConfigError, InputError
from anamorph.files import replacing
from anamorph.pipelines.loading import (
    Loaded,
    Wishes,
    as_component,
    check_slots,
    completed,
    open_component,
    read_component,
    read_scheduler,
    read_tokenizer,
    settle_variant,
)
from anamorph.schedulers import Scheduler
from anamorph.tokenizer import ClipTokenizer


class DiffusionPipeline:
    """Base class; `DiffusionPipeline.from_pretrained` returns the class that `model_index.json` names.

    A subclass declares `SLOTS` (model slot -> classes it takes) and `PARTS` (what it opens, part -> slot).
    """

    SLOTS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    PARTS: ClassVar[Mapping[str, str]] = {}
    show_progress: bool | None = None
    """Whether a call draws a progress bar; None: only where the error stream is a terminal."""
    registry: ClassVar[dict[str, type["DiffusionPipeline"]]] = {}

    def __init_subclass__(cls, public: bool = True) -> None:
        if public:
            DiffusionPipeline.registry[cls.__name__] = cls

    def __init__(
        self,
        *,
        tokenizer: ClipTokenizer,
        scheduler: Scheduler,
        backend: Any = "auto",
        device: Any = None,
        torch_dtype: Any = None,
        origin: Checkpoint | None = None,
        **models: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.origin = origin
        self._given = (backend, device, torch_dtype)
        self._models = {slot: self._open(slot, models[slot]) for slot in self.SLOTS}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        backend: str | Mapping[str, str] = "auto",
        device: Any = None,
        torch_dtype: Any = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        **components: Any,
    ) -> "DiffusionPipeline":
        """Load a pipeline from a checkpoint folder, an exported folder or a hub id; None means the bundled model.

        `backend`, `device` and `torch_dtype` may be mappings from component or part names (and "default") to
        values. `components` replace the checkpoint's own (`scheduler=`, `vae=`, ...; `safety_checker=None`).

        Raises CheckpointError: files are missing, damaged or do not fit. Raises ConfigError: a configuration is
        not served. Raises BackendError: an engine, device or precision is not there. Raises InputError: an
        argument is wrong.
        """
        source = Source(_name(pretrained_model_name_or_path), revision, cache_dir, local_files_only, variant)
        checkpoint = open_checkpoint(source)
        kind = cls._class_for(checkpoint)
        kind._check_overrides(components)
        silenced = [name for name in ("safety_checker", "feature_extractor") if components.get(name, "") is None]
        filled = {name: slot for name, slot in checkpoint.components.items() if name not in silenced}
        check_slots(Checkpoint(checkpoint.folder, kind.__name__, filled, {}), (*kind.SLOTS, "tokenizer", "scheduler"))
        wanted = [slot for slot in kind.SLOTS if slot not in components]
        models = settle_variant([read_component(checkpoint, slot, kind.SLOTS[slot]) for slot in wanted])
        return kind(
            tokenizer=components.get("tokenizer") or read_tokenizer(checkpoint),
            scheduler=components.get("scheduler") or read_scheduler(checkpoint),
            backend=backend,
            device=device,
            torch_dtype=torch_dtype,
            origin=checkpoint,
            **{model.name: model for model in models},
            **{slot: components[slot] for slot in kind.SLOTS if slot in components},
        )

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        *,
        config: str | Path | None = None,
        extract_ema: bool = False,
        prediction_type: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        tokenizer: ClipTokenizer | None = None,
        tokenizer_2: ClipTokenizer | None = None,
        **others: Any,
    ) -> "DiffusionPipeline":
        """Load a pipeline from one `.safetensors` or `.ckpt` file, or the address of one on the hub.

        The file (Stable Diffusion 1, 2 and XL in the layout of the code that trained them) is converted once into a
        folder in the user's cache, which every engine opens like any other. Configurations are read off the shapes, or
        taken from `config`, a checkpoint folder or hub id; `prediction_type` says what Stable Diffusion 2 leaves open.
        The vocabulary is not in the file: it comes from `config`, from a folder `tokenizer` beside the file, or from
        the hub. `others` are arguments of `from_pretrained`.

        Raises CheckpointError: the file is damaged or of another kind, or no tokenizer is found. Raises what
        `from_pretrained` raises.
        """
        from anamorph.original.folder import Wishes, as_folder
        from anamorph.original.reading import find_file

        path = find_file(
            pretrained_model_link_or_path, cache_dir=cache_dir, local_files_only=local_files_only, revision=revision
        )
        given = {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2}
        wishes = Wishes(
            None if config is None else str(config), extract_ema, prediction_type, cache_dir, local_files_only,
            {slot: value for slot, value in given.items() if value is not None},
        )  # fmt: skip
        return cls.from_pretrained(as_folder(path, wishes), **others)

    @classmethod
    def _class_for(cls, checkpoint: Checkpoint) -> type["DiffusionPipeline"]:
        if cls is not DiffusionPipeline:
            return cls
        if checkpoint.class_name not in cls.registry:
            raise ConfigError(
                f"{checkpoint.folder} is a {checkpoint.class_name}, which this version does not have; "
                f"it has {', '.join(cls.registry)}"
            )
        return cls.registry[checkpoint.class_name]

    @classmethod
    def _check_overrides(cls, components: Mapping[str, Any]) -> None:
        known = (*cls.SLOTS, "tokenizer", "scheduler", "safety_checker", "feature_extractor")
        for name, value in components.items():
            if name not in known:
                raise InputError(f"{cls.__name__} has no component or argument {name!r}; it takes {', '.join(known)}")
            if name in ("safety_checker", "feature_extractor") and value is not None:
                raise InputError(f"{name} cannot be run by this version; pass {name}=None or leave it out")
            if name == "scheduler" and not isinstance(value, Scheduler):
                raise InputError(f"scheduler is a {type(value).__name__}, expected a scheduler of anamorph")
            if name == "tokenizer" and not isinstance(value, ClipTokenizer):
                raise InputError(f"tokenizer is a {type(value).__name__}, expected anamorph.ClipTokenizer")

    def _open(self, slot: str, value: Any) -> Loaded:
        component = as_component(slot, value, self.SLOTS[slot])
        parts = [part for part, owner in self.PARTS.items() if owner == slot]
        if isinstance(component, Loaded):
            return completed(component, parts)
        names = [*self.SLOTS, *self.PARTS]
        return open_component(component, parts, Wishes.of(*self._given, names))

    def set_progress_bar_config(self, *, disable: bool = False) -> None:
        """Draw no progress bar, or again only where the error stream is a terminal."""
        self.show_progress = False if disable else None

    def to(self, device: Any = None, torch_dtype: Any = None) -> Self:
        """Open the models again on another device or in another precision; returns the pipeline itself."""
        backend, old_device, old_dtype = self._given
        self._given = (backend, device or old_device, torch_dtype or old_dtype)
        self._models = {slot: self._open(slot, loaded.component) for slot, loaded in self._models.items()}
        return self

    @property
    def components(self) -> dict[str, Any]:
        """All components by name; another pipeline built from them shares their weights."""
        return {**self._models, "tokenizer": self.tokenizer, "scheduler": self.scheduler}

    @property
    def placement(self) -> dict[str, Placement]:
        """Part name -> engine, device and precision that really run it."""
        return {part: placed for loaded in self._models.values() for part, placed in loaded.placement.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the checkpoint in diffusers' layout, weights as float32 safetensors; readable by diffusers.

        Raises OutputError: the disk is full or read-only. Raises InputError: this is an exported folder.
        """
        if exported := [loaded.component for loaded in self._models.values() if loaded.component.artifact]:
            raise InputError(
                f"{exported[0].name} comes from an exported folder, which holds no weights to save; copy it"
            )
        place = Path(folder)
        library = {"tokenizer": "transformers", "text_encoder": "transformers"}
        index: dict[str, Any] = {
            "_class_name": type(self).__name__,
            "_diffusers_version": VERSION_WRITTEN,
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "tokenizer": ["transformers", "CLIPTokenizer"],
        }
        for slot, loaded in self._models.items():
            index[slot] = [library.get(slot, "diffusers"), loaded.component.class_name]
            _save_model(loaded.component, place / slot)
        self.scheduler.save_pretrained(place / "scheduler")
        self.tokenizer.save_pretrained(place / "tokenizer")
        with replacing(place / "model_index.json") as draft:  # last: a folder without it does not load
            draft.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        lines = [f"  {placement}" for placement in self.placement.values()]
        return "\n".join([f"{type(self).__name__}(", *lines, f"  scheduler: {type(self.scheduler).__name__}", ")"])


def _name(given: str | Path | None) -> str:
    from anamorph.checkpoint import BUNDLED

    return str(BUNDLED if given is None else given)


def _save_model(component: Component, folder: Path) -> None:
    from anamorph.models import MODELS

    model = component.module
    if model is None:
        model = MODELS[component.class_name].from_pretrained(component.stored, variant=component.variant)
    model.save_pretrained(folder)
