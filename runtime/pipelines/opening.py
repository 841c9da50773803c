"""How a pipeline comes from a checkpoint, from one file of the original layout, or from another pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from anamorph.checkpoint import BUNDLED, Checkpoint, Source, open_checkpoint
from anamorph.components import Component
from anamorph.pipelines.custom import custom_class
from anamorph.pipelines.describing import settle_variant
from anamorph.pipelines.nets import place_of, spread, unpacked
from anamorph.pipelines.registered import built
from anamorph.pipelines.slots import Slots, check_given, check_slots, read_slot
from anamorph.rewrites import Wish
from anamorph.tokenizer import ClipTokenizer
from anamorph.weights import check_form, find_weights

if TYPE_CHECKING:
    from anamorph.pipelines.base import DiffusionPipeline


class Opening:
    """The ways to a pipeline that `DiffusionPipeline` takes from here."""

    SLOTS: ClassVar[Slots]
    OPTIONS: ClassVar[Mapping[str, Any]]

    @classmethod
    def _class_for(
        cls, class_name: str, where: str, given: Mapping[str, Any] | None = None
    ) -> type["DiffusionPipeline"]:
        """The class that opens what calls itself `class_name`; `where` is what errors name.

        Of the components that are `given`, nets ask for a class that has a place for them.
        """
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        backend: str | Mapping[str, str] = "auto",
        device: Any = None,
        torch_dtype: Any = None,
        rewrites: Wish = None,
        backend_options: Mapping[str, Any] | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        use_safetensors: bool | None = None,
        custom_pipeline: str | Path | None = None,
        trust_remote_code: bool = False,
        guidance_batch: str | None = None,
        **components: Any,
    ) -> "DiffusionPipeline":
        """Load a pipeline from a checkpoint folder, an exported folder or a hub id; None means the bundled model.

        `backend`, `device` and `torch_dtype` may be mappings from component or part names (and "default") to
        values. `components` replace the checkpoint's own (`scheduler=`, `vae=`, ...; `safety_checker=None`) and its
        settings. `use_safetensors=True` refuses pickles, which are otherwise taken where there is nothing else.
        `rewrites` are names out of `anamorph.rewrites.REWRITES`, "all" exact ones or "none"; None takes those that are
        on for the engine by themselves. `backend_options` are told to the engine (see `Backend.options`), or map
        components to theirs. `custom_pipeline` names a Python file that defines the class; it, and machine code of
        exported folders, runs only with `trust_remote_code=True`. `guidance_batch` says whether branches of guidance
        share a call of the denoiser ("joint") or have one each ("apart"), which gives the same pictures and takes less
        memory; None takes what `anamorph tune` has found to be faster, or "joint".

        Raises CheckpointError: files are missing, damaged or do not fit. Raises ConfigError: a configuration is
        not served. Raises BackendError: an engine, device or precision is not there. Raises InputError: an
        argument is wrong.
        """
        name = str(BUNDLED if pretrained_model_name_or_path is None else pretrained_model_name_or_path)
        checkpoint = open_checkpoint(Source(name, revision, cache_dir, local_files_only, variant))
        if custom_pipeline is not None:
            kind = custom_class(custom_pipeline, trusted=trust_remote_code)
        else:
            kind = cls._class_for(checkpoint.class_name, str(checkpoint.folder), components)
        return kind.from_checkpoint(
            checkpoint, components, use_safetensors, backend=backend, device=device, torch_dtype=torch_dtype,
            rewrites=rewrites, backend_options=backend_options, trust_remote_code=trust_remote_code,
            guidance_batch=guidance_batch,
        )  # fmt: skip

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        components: Mapping[str, Any],
        use_safetensors: bool | None = None,
        **wishes: Any,
    ) -> Self:
        """Load from an opened folder; see `from_pretrained`."""
        kind: Any = cls
        if not cls.SLOTS:
            opened: Self = built(kind, checkpoint, components, use_safetensors, wishes)
            return opened
        given = unpacked(cls.SLOTS, components)
        check_given(cls.__name__, spread(cls.SLOTS, given), tuple(cls.OPTIONS), given)
        slots = spread(cls.SLOTS, checkpoint.components)
        check_slots(cls.__name__, slots, checkpoint)
        stored = {name: slot for name, slot in slots.items() if place_of(cls.SLOTS, name) not in components}
        found = {name: read_slot(checkpoint, name, slot) for name, slot in stored.items()}
        settled = settle_variant([value for value in found.values() if isinstance(value, Component)])
        for component in settled if use_safetensors is not None and checkpoint.artifact is None else ():
            check_form(find_weights(component.stored, component.stem, component.variant), use_safetensors)
        found |= {component.name: component for component in settled}
        options = {name: checkpoint.settings[name] for name in cls.OPTIONS if name in checkpoint.settings}
        made: Self = kind(**{**options, **found, **given}, **wishes, origin=checkpoint)
        return made

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
    def from_pipe(cls, pipeline: "DiffusionPipeline", **components: Any) -> "DiffusionPipeline":
        """A pipeline of this class from another one's components and settings, which it shares; no weights are copied.

        `components` replace components or settings. What this class has no place for is left out.
        Raises InputError: a component is missing. Raises ConfigError: the components do not fit this class.
        """
        kind = cls._class_for(type(pipeline).__name__, "the pipeline", components)
        components = {name: value for name, value in components.items() if value is not None or name in kind.SLOTS}
        given = unpacked(kind.SLOTS, components)
        check_given(kind.__name__, spread(kind.SLOTS, given), tuple(kind.OPTIONS), given)
        places = {name: place_of(kind.SLOTS, name) for name in pipeline.components}
        shared = {
            name: value for name, value in pipeline.components.items()
            if places[name] in kind.SLOTS and places[name] not in components
        }  # fmt: skip
        settings = {name: value for name, value in pipeline.options.items() if name in kind.OPTIONS}
        return kind(**{**settings, **shared, **given}, **vars(pipeline._given), origin=pipeline.origin)
