"""From a checkpoint to opened components: which engine, device and precision each one gets, and opening them."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anamorph.artifact import Artifact
from anamorph.checkpoint import ALONE, Checkpoint, Source, component_config, open_checkpoint
from anamorph.components import UNEXPORTED, Component, interfaces
from anamorph.config import Config
from anamorph.engine import PRECISIONS, Backend, Program, Target
from anamorph.errors import ArtifactError, BackendError, CheckpointError, ConfigError, InputError
from anamorph.exporting import cached_export
from anamorph.guard import check_target, open_parts, places_here
from anamorph.guard import missing as lacking
from anamorph.native import preparing, shallow
from anamorph.pipelines.loaded import Loaded, Shown, renamed_part
from anamorph.plugins import choose_backend, get_backend, get_exporter, list_backends
from anamorph.profiles import Profile, applying
from anamorph.rewrites import Wish, fitting, wanted
from anamorph.weights import find_weights

log = logging.getLogger(__name__)

PEERS = ("transformers", "diffusers")
"""Libraries whose models have our classes' names, configurations and weights."""
CHECKPOINT = "checkpoint"
"""The content that engines open who run models themselves."""
DENOISERS = ("UNet2DConditionModel", "UNet2DModel")
"""Classes in whose place other modules are called as diffusers calls them."""
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Given:
    """The arguments of `from_pretrained` that say where and how a pipeline runs, as the caller gave them."""

    backend: str | Mapping[str, str] = "auto"
    device: Any = None
    torch_dtype: Any = None
    rewrites: Wish = None
    backend_options: Mapping[str, Any] | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Wishes:
    """What the caller asked for, per component name, part name or "default"."""

    backend: Mapping[str, str]
    device: Mapping[str, str | None]
    precision: Mapping[str, str | None]
    rewrites: Wish = None
    """Not per part: each rewrite knows its own."""
    options: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"default": {}})
    trusted: bool = False

    @classmethod
    def of(cls, given: Given, names: Sequence[str]) -> "Wishes":
        """Normalise the arguments of `from_pretrained`.

        Raises InputError: a mapping names no component of the pipeline, or a precision is unknown.
        """
        devices = _per_component(given.device, None, names, "device")
        dtypes = _per_component(given.torch_dtype, None, names, "torch_dtype")
        return cls(
            _per_component(given.backend, "auto", names, "backend"),
            {key: None if value is None else str(value) for key, value in devices.items()},
            {key: None if value is None else precision_name(value) for key, value in dtypes.items()},
            given.rewrites,
            _options(given.backend_options, names),
            given.trust_remote_code,
        )

    def backend_of(self, component: Component, part: str) -> Backend:
        """The engine for one part; `auto` is decided by what was measured or what the component holds, and logged."""
        wish = _pick(self.backend, component.name, part)
        if wish != "auto":
            return get_backend(wish)
        if (profile := self.profile_of(component, part)) is not None:
            backend, reason = get_backend(profile.engine), f"auto: {profile}"
        else:
            backend, reason = choose_backend(component.content)
        log.info("%s: engine %s (%s)", part, backend.name, reason)
        return backend

    def profile_of(self, component: Component, part: str) -> Profile | None:
        """What was measured to be best here for this checkpoint, where the caller leaves the choice and the device."""
        engine, device = _pick(self.backend, component.name, part), _pick(self.device, component.name, part)
        if engine != "auto" or component.checkpoint is None or component.artifact is not None or device is not None:
            return None
        profile = applying(component.checkpoint, _pick(self.precision, component.name, part))
        if profile is None or (profile.quality and self.rewrites is not None):
            return None
        backend = list_backends().get(profile.engine)
        return None if backend is None or lacking(backend) is not None else profile

    def target_of(self, component: Component, part: str, backend: Backend) -> Target:
        """Device and precision for one part; what the caller left open was measured, or is the engine's first."""
        places = places_here(backend)
        device = _pick(self.device, component.name, part) or next(iter(places))
        profile = self.profile_of(component, part)
        precision = _pick(self.precision, component.name, part) or (None if profile is None else profile.precision)
        chosen = precision or places.get(device, tuple(PRECISIONS))[0]
        return Target(device, chosen, self.options_of(component, part), self.trusted)

    def options_of(self, component: Component, part: str) -> tuple[tuple[str, str], ...]:
        """What the engine of one part is told beside that."""
        return tuple(sorted(_pick(self.options, component.name, part).items()))


def single_wish(wishes: Mapping[str, Any]) -> tuple[str, str | None, str | None]:
    """Engine, device and precision for all components alike; raises InputError where they are to differ."""
    one = Wishes.of(Given(**wishes), ())
    return one.backend["default"], one.device["default"], one.precision["default"]


def precision_name(value: Any) -> str:
    """`torch.bfloat16`, "bfloat16" or "bf16" -> "bfloat16".

    Raises InputError: the precision is unknown.
    """
    name = str(value).removeprefix("torch.")
    name = SHORT.get(name, name)
    if name not in PRECISIONS:
        raise InputError(f"precision {value!r} is unknown; expected one of {', '.join((*PRECISIONS, *SHORT))}")
    return name


def open_component(
    component: Component, parts: Sequence[str], wishes: Wishes, wide: bool = False, place: str | None = None
) -> Loaded:
    """Open `parts`; those that go to the same engine and target are opened together and share their weights.

    `place` is what the pipeline calls the component, and its parts after it, where that is not its own name.
    A `wide` component whose configuration says `force_upcast` runs in float32 unless float16 is wished for it by name.
    One that no exporter writes runs where checkpoints are opened, unless another engine is wished for it by name.
    """
    groups: dict[tuple[str, Target], tuple[Backend, list[str]]] = {}
    notes: dict[str, str] = {}
    place = place or component.name
    asking = replace(component, name=place)
    for part in parts:
        backend = wishes.backend_of(asking, part)
        target = wishes.target_of(asking, part, backend)
        if component.class_name in UNEXPORTED and CHECKPOINT not in backend.formats:
            if {part, place} & set(wishes.backend):
                raise BackendError(
                    f"{part} cannot be exported for engine {backend.name}; name one that opens checkpoints"
                )
            notes["instead of"] = backend.name
            backend, reason = choose_backend(CHECKPOINT)
            device, precisions = next(iter(places_here(backend).items()))
            target = Target(device, precisions[0])
            log.info("%s: engine %s (%s), as no exporter writes it", part, backend.name, reason)
        named = {part, place} & set(wishes.precision)
        if target.precision == "float16" and wide and component.config.get("force_upcast") and not named:
            log.info("%s: kept in float32, as it overflows in float16; name it in torch_dtype to insist", part)
            target = replace(target, precision="float32")
            notes["instead of"] = "float16"
        groups.setdefault((backend.name, target), (backend, []))[1].append(renamed_part(part, place, component.name))
    programs: dict[str, Program] = {}
    profile: Profile | None = None
    for (_, target), (backend, names) in groups.items():
        check_target(backend, target)  # before anything is exported
        profile = wishes.profile_of(asking, names[0])
        readable = _tuned(component, profile) or _readable(component, backend, wishes.rewrites or _rewrites(profile))
        beside = [more for name in names for more in (preparing(name), shallow(name))]
        further = [more for more in beside if more in readable.parts]
        programs |= open_parts(backend, readable, [*names, *further], target)
    return Loaded(component, programs, notes, profile=profile).placed(place)


def _rewrites(profile: Profile | None) -> Wish:
    return None if profile is None else profile.rewrites or None


def _tuned(component: Component, profile: Profile | None) -> Component | None:
    """The component from the export that was measured, where there is one and it can be exported at all."""
    if profile is None or not profile.folder or component.class_name in UNEXPORTED:
        return None
    assert component.checkpoint is not None
    return _exported(component, open_checkpoint(Source(profile.folder), made_from=component.checkpoint.folder))


def completed(loaded: Loaded, parts: Sequence[str], wishes: Wishes) -> Loaded:
    """A component that another pipeline opened, with `parts` beside what it has; they go where its first part runs."""
    missing = [part for part in parts if part not in loaded.programs]
    if not missing:
        return loaded
    placed = next(iter(loaded.programs.values())).placement
    backend = get_backend(placed.engine)
    readable = _readable(loaded.component, backend, wishes.rewrites)
    options = wishes.options_of(loaded.component, missing[0])
    target = Target(placed.device, placed.precision, options, wishes.trusted)
    more = open_parts(backend, readable, missing, target)
    return replace(loaded, programs={**loaded.programs, **more})


def _readable(component: Component, backend: Backend, rewrites: Wish) -> Component:
    """The component in a form that the engine opens: itself, or its export in the user's cache.

    Raises BackendError: the engine opens neither this nor what could be made of it. Raises InputError: rewrites are
    wished for, but it is a graph already.
    """
    if component.content in backend.formats:
        return _rewritten(component, backend, rewrites)
    opens = ", ".join(backend.formats)
    if component.artifact is not None:
        raise BackendError(
            f"engine {backend.name} opens {opens}, but {component.artifact.folder} is {component.content}; "
            f"name the checkpoint, or leave the backend to auto"
        )
    if component.checkpoint is None or (component.module is not None and not component.module.as_stored()):
        raise BackendError(
            f"engine {backend.name} opens {opens}, but {component.name} is a module; save the pipeline with "
            "save_pretrained and load that folder"
        )
    exported = cached_export(component.checkpoint, get_exporter(backend.formats), rewrites)
    return _exported(component, exported)


def _exported(component: Component, exported: Checkpoint) -> Component:
    """The component out of its export, for the same adapters."""
    found = read_component(exported, component.name, (component.class_name,))
    return replace(found, adapted=component.adapted, fused=component.fused)


def _rewritten(component: Component, backend: Backend, rewrites: Wish) -> Component:
    """The component, to be computed by these rewrites; a module that a caller built stays as it is."""
    if component.artifact is not None and rewrites is not None:
        raise InputError(
            f"{component.artifact.folder} is an exported folder, which computes as it was exported; leave rewrites "
            "out, or export the checkpoint with them"
        )
    if component.artifact is not None or component.module is not None:
        return component
    names = wanted(rewrites, backend.name)
    applied = {
        name for part in component.parts for name in fitting(names, part, component.class_name, component.config)
    }
    return replace(component, rewrites=tuple(name for name in names if name in applied))


def as_component(
    name: str, value: Any, class_names: Sequence[str], refining: bool = False, replaced: Loaded | None = None
) -> Component | Loaded:
    """What a pipeline was given for a model slot; models of other libraries lend us their weights.

    Another PyTorch module takes the place of a denoiser, whose configuration is that of the model which it was
    compiled from, or which it takes the place of (`replaced`).
    Raises InputError: something else than a component or one of our PyTorch models, or a model of a wrong class.
    """
    value = value.loaded if isinstance(value, Shown) else value
    value = alone(value, class_names) if isinstance(value, str | Path) else value
    if isinstance(value, Component | Loaded):
        given = value.component if isinstance(value, Loaded) else value
        if given.class_name not in class_names:
            raise InputError(f"{name} is a {given.class_name}, expected {' or '.join(class_names)}")
        return value
    kind = type(value).__name__
    if kind in class_names and type(value).__module__.partition(".")[0] in PEERS:
        value = _adopted(value)
    config = getattr(value, "config", None)
    if kind not in class_names and (called := _called(name, value, class_names, replaced)) is not None:
        return called
    if kind not in class_names or not isinstance(config, Config):
        raise InputError(f"{name} is a {kind}, expected a model of anamorph: {' or '.join(class_names)}")
    component = Component(name, kind, config, module=value, refining=refining)
    if kind in ALONE and value.origin is not None:
        folder, variant = value.origin
        opened = open_checkpoint(Source(str(folder), variant=variant))
        return replace(component, name=ALONE[kind], checkpoint=opened)
    return component


def alone(source: str | Path, class_names: Sequence[str]) -> Component:
    """The only model of a folder or hub id, of a checkpoint or exported; raises ConfigError: one of another class."""
    opened = open_checkpoint(Source(str(source)))
    if opened.class_name not in class_names:
        raise ConfigError(f"{opened.folder} is a {opened.class_name}, expected {' or '.join(class_names)}")
    return read_component(opened, next(iter(opened.components)), class_names)


def _called(name: str, value: Any, class_names: Sequence[str], replaced: Loaded | None) -> Component | None:
    """A stranger's PyTorch module as a denoiser, or None."""
    torch = sys.modules.get("torch")  # without it there is no such module
    if torch is None or not isinstance(value, torch.nn.Module):
        return None
    inner = getattr(value, "_orig_mod", None)
    known = inner.loaded if isinstance(inner, Shown) else replaced
    if known is not None:
        model = known.component
    elif isinstance(config := getattr(inner, "config", None), Config):
        model = Component(name, type(inner).__name__, config)
    else:
        return None
    if model.class_name not in DENOISERS or model.class_name not in class_names:
        return None
    from anamorph.models.called import Called

    ports = interfaces(model.class_name, name, model.refining)[name](model.config).inputs[2:]
    module = Called(value, [port.name for port in ports])
    return Component(name, model.class_name, model.config, module=module, refining=model.refining)


def _adopted(model: Any) -> Any:
    """The same model as one of ours, with the weights of the other library's."""
    from anamorph.models import MODELS

    config = dict(model.config) if isinstance(model.config, Mapping) else model.config.to_dict()
    return MODELS[type(model).__name__].adopt(model, config)


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


def _options(value: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """Options of engines for all components, or for those that are named; values as texts.

    Raises InputError: a component is unknown, or options are no mapping.
    """
    if value is None or not all(isinstance(one, Mapping) for one in value.values()):
        value = {"default": value or {}}
    found = _per_component(value, {}, names, "backend_options")
    return {name: {key: str(one) for key, one in options.items()} for name, options in found.items()}


def _per_component(value: Any, default: Any, names: Sequence[str], argument: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {"default": default if value is None else value}
    if strange := [key for key in value if key not in names and key != "default"]:
        raise InputError(f"{argument} names {', '.join(map(str, strange))}; expected default, {', '.join(names)}")
    return {"default": default, **value}


def _pick(wishes: Mapping[str, Any], component: str, part: str) -> Any:
    return wishes.get(part, wishes.get(component, wishes["default"]))
