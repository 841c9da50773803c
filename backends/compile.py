"""PyTorch through torch.compile: one compiled program per input shape, each announced when it is made."""

import importlib.util
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from anamorph.backends.eager import INSTALL, Eager
from anamorph.cache import cache_folder
from anamorph.engine import Backend
from anamorph.entries import check_owner
from anamorph.memory import ChannelsLast, Saving
from anamorph.native import is_preparing
from anamorph.plugins import hookimpl

log = logging.getLogger(__name__)

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""Inductor's environment variable for its folder."""
SHAPES = 64
"""Shapes that may be compiled before an error says so (each costs compile time and memory)."""


class ShapeSpecialised:
    """A function compiled once per tuple of input shapes.

    The whole function must compile (`fullgraph`): a silent fallback to eager, or a recompile that nobody asked
    for, is an error here. Safe to call from several threads; the first call with new shapes compiles alone.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]], part: str) -> None:
        import torch

        keep_code()
        # All models of one class share the limit of their code; under fullgraph, reaching it is an error.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
        self.part = part
        self.compiled: Callable[..., tuple[Any, ...]] = torch.compile(function, fullgraph=True, dynamic=False)
        self.known: set[tuple[tuple[int, ...] | None, ...]] = set()
        self.lock = threading.Lock()

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        shapes = tuple(None if value is None else tuple(value.shape) for value in values)  # None: left out
        if shapes in self.known:
            return self.compiled(*values)
        with self.lock:
            if shapes not in self.known:
                log.info("compiling %s for input shapes %s", self.part, shapes)
            result = self.compiled(*values)
            self.known.add(shapes)
            return result


def keep_code() -> None:
    """Let Inductor keep its code in the user's cache, unless the variable names another folder.

    Left to itself, it takes one below the system's folder for temporary files, and loads native code from there.
    """
    if FOLDER not in os.environ:
        place = cache_folder() / "inductor"
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            log.warning("cannot make %s (%s); Inductor keeps its code in its own folder", place, error.strerror)
            return
        check_owner(place)
        os.environ[FOLDER] = str(place)


class Compile(Eager):
    """torch.compile with Inductor; the first picture of each size waits for the compiler."""

    name = "compile"
    sizes = "each"
    options: Mapping[str, str] = MappingProxyType({})  # its compiler chooses kernels by itself
    savings: tuple[type[Saving], ...] = (ChannelsLast,)  # hooks and slices would be compiled again and again
    padded = True
    rank = None  # minutes of compilation are never spent without being asked for

    def unavailable(self) -> str | None:
        if not importlib.util.find_spec("torch"):
            return INSTALL
        if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
            return "torch.compile needs a C++ compiler; run: apt-get install g++"
        return None

    def function(self, module: Any, part: str) -> Callable[..., tuple[Any, ...]]:
        plain = super().function(module, part)
        # What runs once per picture is no sooner compiled than computed, for each number of steps anew.
        return plain if is_preparing(part) else ShapeSpecialised(plain, part)


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [Compile()]
