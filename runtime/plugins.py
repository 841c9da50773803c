"""Finding engines: pluggy plug-ins from entry points, the built-in ones through the same door as a stranger's.

A package offers an engine with an entry point of the group `anamorph` that names a module or object with

    @anamorph.hookimpl
    def anamorph_backends() -> list[Backend]: ...

and writers of formats with `anamorph_exporters() -> list[Exporter]`.

The environment variable ANAMORPH_PLUGINS narrows what is imported: `none`, or entry-point names joined by commas.
"""

import functools
import importlib.metadata
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pluggy

from anamorph.engine import Backend
from anamorph.errors import BackendError, BackendUnavailable, InputError
from anamorph.exporting import Exporter
from anamorph.guard import check_declared, check_exporter, missing

GROUP = "anamorph"
VARIABLE = "ANAMORPH_PLUGINS"

T = TypeVar("T")

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class Hooks:
    """Everything that a plug-in may offer."""

    @hookspec
    def anamorph_backends(self) -> list[Backend]:
        """The engines of this plug-in."""
        raise NotImplementedError

    @hookspec
    def anamorph_exporters(self) -> list[Exporter]:
        """The exporters of this plug-in."""
        raise NotImplementedError


@dataclass(frozen=True)
class Discovery:
    """Engines by name, exporters by format, and the plug-ins that failed to load with their reason."""

    backends: dict[str, Backend] = field(default_factory=dict)
    exporters: dict[str, Exporter] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def discover(chosen: str | None = None) -> Discovery:
    """Import the plug-ins and collect their engines; a plug-in that fails is named and left out.

    `chosen` is as in ANAMORPH_PLUGINS, which it overrides.
    Raises InputError: a chosen name is no entry point of the group.
    """
    found = importlib.metadata.entry_points(group=GROUP)
    wish = os.environ.get(VARIABLE, "") if chosen is None else chosen
    names = {name.strip() for name in wish.split(",") if name.strip()}
    if names and names != {"none"} and (lost := names - found.names):
        raise InputError(f"{VARIABLE} names {', '.join(sorted(lost))}; installed are {', '.join(sorted(found.names))}")
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Hooks)
    result = Discovery()
    for entry in found:
        if names and entry.name not in names:
            continue
        try:
            plugin = entry.load()
            manager.register(plugin, entry.name)
            others = _others(manager, plugin)
            for offer in manager.subset_hook_caller("anamorph_backends", others)():
                for backend in offer:
                    check_declared(backend)
                _add("an engine", result.backends, {backend.name: backend for backend in offer})
            for offer in manager.subset_hook_caller("anamorph_exporters", others)():
                for exporter in offer:
                    check_exporter(exporter)
                _add("an exporter", result.exporters, {exporter.format: exporter for exporter in offer})
        except (Exception, SystemExit) as error:  # a stranger's module may raise anything while it is imported
            result.failures[entry.name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"plug-in {entry.name} could not be loaded ({error}); the others are", stacklevel=2)
    return result


def _others(manager: pluggy.PluginManager, plugin: object) -> list[object]:
    return [other for other in manager.get_plugins() if other is not plugin]


def _add(what: str, known: dict[str, T], offered: Mapping[str, T]) -> None:
    for name, value in offered.items():
        if name in known:
            raise BackendError(f"{what} named {name!r} is already there; rename one of the two")
        known[name] = value


@functools.cache
def installed() -> Discovery:
    """What `discover` finds, kept for this process."""
    return discover()


def list_backends() -> dict[str, Backend]:
    """All engines that plug-ins offer, available or not."""
    return dict(installed().backends)


def get_backend(name: str) -> Backend:
    """The engine called `name`.

    Raises BackendError: unknown. Raises BackendUnavailable: known, but it cannot run here; says what to install.
    """
    found = installed()
    if name not in found.backends:
        broken = f" (failed to load: {', '.join(found.failures)})" if found.failures else ""
        raise BackendError(f"there is no engine {name!r}; known are auto, {', '.join(sorted(found.backends))}{broken}")
    backend = found.backends[name]
    if (reason := missing(backend)) is not None:
        raise BackendUnavailable(f"engine {name} is not available: {reason}")
    return backend


def get_exporter(formats: Sequence[str]) -> Exporter:
    """An exporter that writes one of `formats`.

    Raises BackendError: there is none. Raises BackendUnavailable: it cannot run here; says what to install.
    """
    known = installed().exporters
    found = [known[name] for name in formats if name in known]
    if not found:
        raise BackendError(f"nothing exports to {' or '.join(formats)}; known are {', '.join(sorted(known)) or 'none'}")
    reasons = [missing(exporter) for exporter in found]
    for exporter, reason in zip(found, reasons, strict=True):
        if reason is None:
            return exporter
    raise BackendUnavailable(f"exporting to {found[0].format} is not available: {reasons[0]}")


def choose_backend(content: str) -> tuple[Backend, str]:
    """The engine that `backend="auto"` takes for `content` ("checkpoint" or an exported format), and why.

    Rule: of the available engines that open this content and take part in the choice, the highest rank.
    """
    able = [b for b in list_backends().values() if content in b.formats and b.rank is not None]
    ready = [b for b in able if missing(b) is None]
    if not ready:
        reasons = "; ".join(f"{b.name}: {missing(b)}" for b in able) or "no plug-in offers one"
        raise BackendUnavailable(f"no engine can open a {content} here ({reasons})")
    best = max(ready, key=lambda b: b.rank or 0)
    return best, f"auto: {best.name} has the highest rank of the available engines that open a {content}"
