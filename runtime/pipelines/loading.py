"""From a checkpoint to opened components: which engine, device and precision each one gets, and opening them."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace

from anamorph.checkpoint import Checkpoint, Source, open_checkpoint
from anamorph.components import CHECKPOINT, UNEXPORTED, Component
from anamorph.engine import Backend, Concurrent, Program, Target
from anamorph.errors import BackendError, InputError
from anamorph.exporting import cached_export
from anamorph.guard import check_target, open_parts, places_here
from anamorph.machine import available_processors
from anamorph.native import preparing, shallow
from anamorph.pipelines.describing import read_component
from anamorph.pipelines.loaded import Loaded, renamed_part
from anamorph.pipelines.wishes import Wishes
from anamorph.plugins import choose_backend, get_backend, get_exporter
from anamorph.profiles import Profile
from anamorph.rewrites import Wish, fitting, wanted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """A component in forms that engines open: with each, the names of parts, and where these shall run."""

    component: Component
    place: str
    groups: Sequence[tuple[Backend, Component, Sequence[str], Target]]
    notes: Mapping[str, str]
    profile: Profile | None

    @property
    def concurrent(self) -> bool:
        """Whether all of its engines open it while others open other components."""
        return all(isinstance(backend, Concurrent) and backend.concurrent for backend, *_ in self.groups)

    def open(self) -> Loaded:
        """Open the parts; raises what `open_parts` raises."""
        programs: dict[str, Program] = {}
        for backend, readable, names, target in self.groups:
            programs |= open_parts(backend, readable, names, target)
        return Loaded(self.component, programs, self.notes, profile=self.profile).placed(self.place)


def open_all(every: Mapping[str, Ready | Loaded]) -> dict[str, Loaded]:
    """All components, those of engines that can beside one another.

    Raises what opening the first of them raises that fails, in their order.
    """
    waiting = {name: one.open for name, one in every.items() if isinstance(one, Ready) and one.concurrent}
    with ThreadPoolExecutor(max(1, min(len(waiting), available_processors() or 1))) as pool:
        # Each thread has a context of its own.
        begun = {name: pool.submit(copy_context().run, work) for name, work in waiting.items()}
        try:
            return {name: begun[name].result() if name in begun else _opened(one) for name, one in every.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _opened(one: Ready | Loaded) -> Loaded:
    return one.open() if isinstance(one, Ready) else one


def ready(
    component: Component, parts: Sequence[str], wishes: Wishes, wide: bool = False, place: str | None = None
) -> Ready:
    """Settle where `parts` run, and export what must be; those of one engine and target share their weights.

    `place` is what the pipeline calls the component, and its parts after it, where that is not its own name.
    A `wide` component whose configuration says `force_upcast` runs in float32 unless float16 is wished for it by name.
    One that no exporter writes runs where checkpoints are opened, unless another engine is wished for it by name.
    """
    groups: dict[tuple[str, Target], tuple[Backend, list[str]]] = {}
    notes: dict[str, str] = {}
    place = place or component.name
    asking = replace(component, name=place)
    for part in parts:
        backend, target = _settled(asking, part, wishes, wide, notes)
        groups.setdefault((backend.name, target), (backend, []))[1].append(renamed_part(part, place, component.name))
    found = []
    profile: Profile | None = None
    for (_, target), (backend, names) in groups.items():
        check_target(backend, target)  # before anything is exported
        profile = wishes.profile_of(asking, names[0])
        readable = _tuned(component, profile) or _readable(component, backend, wishes.rewrites or _rewrites(profile))
        beside = [more for name in names for more in (preparing(name), shallow(name))]
        further = [more for more in beside if more in readable.parts]
        found.append((backend, readable, [*names, *further], target))
    return Ready(component, place, found, notes, profile)


def _settled(
    component: Component, part: str, wishes: Wishes, wide: bool, notes: dict[str, str]
) -> tuple[Backend, Target]:
    """Engine and target of one part; what differs from the wish is noted."""
    backend = wishes.backend_of(component, part)
    target = wishes.target_of(component, part, backend)
    if component.class_name in UNEXPORTED and CHECKPOINT not in backend.formats:
        if {part, component.name} & set(wishes.backend):
            raise BackendError(f"{part} cannot be exported for engine {backend.name}; name one that opens checkpoints")
        notes["instead of"] = backend.name
        backend, reason = choose_backend(CHECKPOINT)
        device, precisions = next(iter(places_here(backend).items()))
        target = Target(device, precisions[0])
        log.info("%s: engine %s (%s), as no exporter writes it", part, backend.name, reason)
    named = {part, component.name} & set(wishes.precision)
    if target.precision == "float16" and wide and component.config.get("force_upcast") and not named:
        log.info("%s: kept in float32, as it overflows in float16; name it in torch_dtype to insist", part)
        target = replace(target, precision="float32")
        notes["instead of"] = "float16"
    return backend, target


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
