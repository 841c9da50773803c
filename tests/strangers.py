"""Plug-ins of strangers, pretended: entry points that name modules made here."""

import importlib.metadata
import sys
import types
from typing import Any

import pytest

from anamorph import hookimpl, plugins
from anamorph.backends.null import Null
from anamorph.engine import Backend
from anamorph.exporting import Exporter


def install(monkeypatch: pytest.MonkeyPatch, **modules: types.ModuleType | None) -> None:
    """Pretend that packages offer these entry points; None stands for a module that fails to import."""
    points = []
    for name, module in modules.items():
        if module is not None:
            monkeypatch.setitem(sys.modules, f"stranger_{name}", module)
        points.append(importlib.metadata.EntryPoint(name, f"stranger_{name}", plugins.GROUP))
    found = importlib.metadata.EntryPoints(points)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found.select(group=group))


def plugin(*engines: Backend | Any, exporters: tuple[Exporter | Any, ...] = ()) -> types.ModuleType:
    """A module that offers them."""
    module = types.ModuleType("stranger")
    module.anamorph_backends = hookimpl(lambda: list(engines))  # type: ignore[attr-defined]
    if exporters:
        module.anamorph_exporters = hookimpl(lambda: list(exporters))  # type: ignore[attr-defined]
    return module


class Named(Null):
    """The null engine under another name and rank."""

    def __init__(self, name: str, rank: int | None = None, missing: str | None = None) -> None:
        self.name, self.rank, self.missing = name, rank, missing

    def unavailable(self) -> str | None:
        return self.missing
