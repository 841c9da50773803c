"""PyTorch through torch.compile: one compiled program per input shape, over the same weights."""

import importlib.util
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from anamorph.backends import cuda_graphs
from anamorph.backends.buckets import COMPILED, Buckets, Sizes
from anamorph.backends.cuda_graphs import Recorded
from anamorph.backends.eager import INSTALL, Eager, TorchProgram
from anamorph.cache import cache_folder
from anamorph.components import Component
from anamorph.engine import Backend, Target
from anamorph.entries import check_owner
from anamorph.interface import Interface
from anamorph.memory import ChannelsLast, Saving
from anamorph.native import is_preparing
from anamorph.plugins import hookimpl

log = logging.getLogger(__name__)

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""Inductor's environment variable for its folder."""
MOST = 8
"""Shapes of a part that stay compiled. They share the model's weights, so that each costs its code alone."""


class Compiled:
    """A function that its first call compiles, for the shapes of that call.

    The whole function must compile (`fullgraph`): a silent fallback to eager, or a recompile that nobody asked
    for, is an error here. Safe to call from several threads; the first call compiles alone.
    """

    origin = COMPILED

    def __init__(self, function: Callable[..., tuple[Any, ...]]) -> None:
        import torch

        def call(*values: Any) -> tuple[Any, ...]:
            return function(*values)

        # What is compiled belongs to an object of code; one for each shape can be forgotten alone.
        call.__code__ = call.__code__.replace()
        weakref.finalize(self, torch._C._dynamo.eval_frame.reset_code, call.__code__)
        self.function: Callable[..., tuple[Any, ...]] = torch.compile(call, fullgraph=True, dynamic=False)
        self.lock = threading.Lock()
        self.called = False

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        """Compile if need be, and compute."""
        if self.called:
            return self.function(*values)
        with self.lock:
            result = self.function(*values)
            self.called = True
            return result


class ShapeSpecialised:
    """A function of the inputs of an interface in their order, compiled once per tuple of shapes, perhaps recorded."""

    def __init__(
        self, function: Callable[..., tuple[Any, ...]], interface: Interface, *, recorded: bool = False
    ) -> None:
        keep_code()
        self.function, self.interface, self.recorded = function, interface, recorded
        self.known: dict[tuple[tuple[int, ...] | None, ...], Sizes] = {}
        most = cuda_graphs.MOST if recorded else MOST
        self.buckets: Buckets[Compiled | Recorded] = Buckets(self._made, most=most, again=0)

    def __call__(self, *values: Any) -> tuple[Any, ...]:
        """Compute; what was left out is None."""
        key = tuple(None if value is None else tuple(value.shape) for value in values)
        if key not in self.known:
            self.known[key] = self._sizes(values)
        return self.buckets.take(self.known[key])(*values)

    def _sizes(self, values: Sequence[Any]) -> Sizes:
        ports = zip(self.interface.inputs, values, strict=True)
        given = {port.name: value for port, value in ports if value is not None}
        return Sizes(
            {name: tuple(value.shape) for name, value in given.items()}, list(given), self.interface.sizes_of(given)
        )

    def _made(self, sizes: Sizes | None) -> Compiled | Recorded:
        log.info("compiling %s for %s", self.interface.component, sizes)
        compiled = Compiled(self.function)
        return Recorded(compiled, compiled.origin) if self.recorded else compiled


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
    options: Mapping[str, str] = MappingProxyType({
        cuda_graphs.OPTION: "on: the kernels of a call are recorded once and replayed without the host (CUDA; tested "
        "with the device faked alone)",
    })  # fmt: skip
    savings: tuple[type[Saving], ...] = (ChannelsLast,)  # hooks and slices would be compiled again and again
    padded = True
    rank = None  # minutes of compilation are never spent without being asked for

    def unavailable(self) -> str | None:
        if not importlib.util.find_spec("torch"):
            return INSTALL
        if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
            return "torch.compile needs a C++ compiler; run: apt-get install g++"
        return None

    def program(self, component: Component, module: Any, part: str, target: Target) -> TorchProgram:
        plain = super().program(component, module, part, target)
        recorded = cuda_graphs.asked(target)
        if is_preparing(part):  # what runs once per picture is no sooner compiled than computed
            return plain
        function = ShapeSpecialised(plain.function, plain.interface, recorded=recorded)
        savings = () if recorded else plain.savings  # a recording reads weights where they lay
        return replace(plain, function=function, history=function.buckets.history, savings=savings)


@hookimpl
def anamorph_backends() -> list[Backend]:
    return [Compile()]
