"""Plug-ins are held to what they promise: whatever goes wrong in one is a typed error that names it.

Everything that the runtime asks of a stranger's engine passes through here, so that neither an exception of any type
nor a result that is not what was declared reaches the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

from anamorph.arrays import Array
from anamorph.components import Component
from anamorph.engine import PRECISIONS, SIZES, Around, Backend, Costs, Program, Session, Target, kind_of
from anamorph.errors import AnamorphError, BackendError
from anamorph.exporting import LINKED, STORAGE, Exporter
from anamorph.interface import Interface

if TYPE_CHECKING:
    from anamorph.pipelines.loaded import Loaded


def check_declared(backend: Any) -> None:
    """Raise BackendError where what a plug-in offers is no engine, or declares what does not exist; nothing runs."""
    name = getattr(backend, "name", type(backend).__name__)
    if not isinstance(backend, Backend):
        members = [member for member in _MEMBERS if not hasattr(backend, member)]
        raise BackendError(f"engine {name} lacks {', '.join(members)}; see anamorph.engine.Backend")
    wrong = {
        "name": isinstance(name, str) and name not in ("", "auto"),
        "formats": isinstance(backend.formats, tuple) and all(isinstance(form, str) for form in backend.formats),
        "rank": backend.rank is None or isinstance(backend.rank, int),
        "double": isinstance(backend.double, bool),
        "places": isinstance(backend.places, Mapping) and all(map(_known, backend.places.values())),
        "sizes": backend.sizes in SIZES,
        "costs": isinstance(backend.costs, Costs),
        "options": isinstance(backend.options, Mapping) and all(isinstance(name, str) for name in backend.options),
    }
    if lost := [member for member, right in wrong.items() if not right]:
        said = ", ".join(f"{member} = {getattr(backend, member)!r}" for member in lost)
        raise BackendError(f"engine {name} declares {said}, which is not what anamorph.engine.Backend asks for")


_MEMBERS = ("name", "formats", "rank", "double", "places", "sizes", "costs", "options", "unavailable", "devices",
            "precisions", "open")  # fmt: skip


def _known(precisions: object) -> bool:
    return isinstance(precisions, tuple) and bool(precisions) and set(precisions) <= set(PRECISIONS)


def check_exporter(exporter: Any) -> None:
    """Raise BackendError where what a plug-in offers is no exporter; nothing runs."""
    name = getattr(exporter, "format", type(exporter).__name__)
    if not isinstance(exporter, Exporter):
        lost = [member for member in _WRITING if not hasattr(exporter, member)]
        raise BackendError(f"exporter {name} lacks {', '.join(lost)}; see anamorph.exporting.Exporter")
    if not isinstance(exporter.storages, tuple) or not set(exporter.storages) <= {*STORAGE, LINKED}:
        raise BackendError(f"exporter {name} stores weights as {exporter.storages!r}; expected some of {STORAGE}")


_WRITING = ("format", "storages", "unavailable", "fingerprint", "export", "verify")


def missing(plugin: Backend | Exporter) -> str | None:
    """What an engine or exporter says is missing here, or None; one that fails to answer is missing itself."""
    try:
        reason = plugin.unavailable()
    except Exception as error:  # a stranger's code may raise anything
        return f"its plug-in fails to say whether it can run ({_said(error)}); update or remove it"
    if reason is None or isinstance(reason, str):
        return reason
    return f"its plug-in answers {reason!r} instead of a sentence; update or remove it"


def places_here(backend: Backend) -> dict[str, tuple[str, ...]]:
    """Device on this machine -> precisions there, the preferred ones first.

    Raises BackendError: the engine fails to answer, or names what it has not declared.
    """
    try:
        found = {device: tuple(backend.precisions(device)) for device in backend.devices()}
    except Exception as error:
        raise BackendError(f"engine {backend.name} fails to name its devices: {_said(error)}") from error
    for device, precisions in found.items():
        declared = backend.places.get(kind_of(device), ())
        if not precisions or not set(precisions) <= set(declared):
            raise BackendError(
                f"engine {backend.name} names {', '.join(precisions) or 'nothing'} on {device}, but declares "
                f"{', '.join(declared) or 'no such device'}; report it to its author"
            )
    if not found:
        raise BackendError(f"engine {backend.name} says that it can run and has no device; report it to its author")
    return found


def check_target(backend: Backend, target: Target) -> None:
    """Raise BackendError where this engine does not serve that device, precision or option on this machine."""
    places = places_here(backend)
    if target.device not in places:
        raise BackendError(
            f"engine {backend.name} has no device {target.device!r} on this machine; it has {', '.join(places)}"
        )
    if target.precision not in places[target.device]:
        raise BackendError(
            f"engine {backend.name} does not run in {target.precision} on {target.device}; "
            f"it serves {', '.join(places[target.device])}"
        )
    if strange := [name for name, _ in target.options if not any(map(partial(fnmatchcase, name), backend.options))]:
        known = ", ".join(backend.options) or "none"
        raise BackendError(f"engine {backend.name} has no option {', '.join(strange)}; it has {known}")


def open_parts(backend: Backend, component: Component, parts: Sequence[str], target: Target) -> dict[str, Program]:
    """Open parts of a component through an engine; what comes back is held to the interface and to the target.

    Raises BackendError: the engine fails, or opened something else than it was asked for. Raises what `Backend.open`
    raises.
    """
    check_target(backend, target)
    try:
        found = backend.open(component, parts, target)
    except AnamorphError:
        raise
    except Exception as error:
        raise BackendError(f"engine {backend.name} fails to open {', '.join(parts)}: {_said(error)}") from error
    if lost := [part for part in parts if part not in found]:
        raise BackendError(f"engine {backend.name} was asked for {', '.join(lost)} and opened only {', '.join(found)}")
    for part, program in found.items():
        placed = program.placement
        asked = backend.name, kind_of(target.device), target.precision
        if (placed.engine, kind_of(placed.device), placed.precision) != asked:
            raise BackendError(f"engine {backend.name} was asked for {_where(target)} and opened {placed}")
        having = {port.name for port in program.interface.outputs}
        needed = [port.name for port in component.interface(part).outputs if not port.optional]
        if absent := [name for name in needed if name not in having]:
            raise BackendError(
                f"engine {backend.name} opened {part} without {', '.join(absent)}, which its interface declares"
            )
    return {part: Held(program, backend.name) for part, program in found.items()}


def _where(target: Target) -> str:
    return f"{target.precision} on {target.device}"


def _said(error: Exception) -> str:
    """The kind of a failure and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass(frozen=True)
class Held(Around):
    """A program whose sessions are held to its interface."""

    engine: str

    def session(self) -> Session:
        """See `Program.session`."""
        program = self.program
        return HeldSession(program.session(), program.interface, self.engine, program.arrays.asynchronous)

    def shown(self, loaded: "Loaded") -> Any:
        """See `Program.shown`."""
        return self.program.shown(loaded)


@dataclass(frozen=True)
class HeldSession:
    """A session whose inputs fit, and whose outputs have the names, shapes and types that were declared."""

    session: Session
    interface: Interface
    engine: str
    asynchronous: bool = False

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        sizes = self.interface.check(inputs)
        if not self.asynchronous:  # on a device, asking for values would stop its queue
            self.interface.check_values(inputs)
        what = self.interface.component
        try:
            outputs = self.session(inputs)
        except AnamorphError:
            raise
        except Exception as error:
            raise BackendError(f"engine {self.engine} failed in {what}: {_said(error)}") from error
        shapes = self.interface.output_shapes(sizes)
        for port in self.interface.outputs:
            if port.name not in outputs:
                raise BackendError(f"engine {self.engine} returned no {port.name} from {what}; report it to its author")
            value = outputs[port.name]
            found, kind = tuple(value.shape), str(value.dtype).removeprefix("torch.")
            if (found, kind) != (shapes[port.name], port.dtype):
                # An engine that is called outside its graph's sizes may return a stale or cut result.
                raise BackendError(
                    f"engine {self.engine} returned {port.name} from {what} as {kind} of shape {list(found)}, expected "
                    f"{port.dtype} of shape {list(shapes[port.name])}; report it to its author"
                )
        return outputs
