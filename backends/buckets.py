"""Which sizes of a program get a compiled model of their own, and which share one that takes all sizes.

A model for one size is faster, but takes time to compile and, where an engine packs its weights for each, memory. So
the first size that a program meets gets one: something must be compiled in any case. Every other size is served by the
model for all sizes, until it was called `AGAIN` times, when it has paid for its own. At most `MOST` sizes have one, and
only where there is memory for a further one; the one that was not called for longest leaves.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from anamorph.machine import own_memory
from anamorph.memory import OwnSizes

MOST = 2
SPARED = 2
"""A further model is made where so many times the bytes of its weights are free."""
AGAIN = 40
TELLING = 10_000_000
"""What is smaller may be other threads' (bytes)."""
UNSHARED = "; models of this engine share no packed weights"
COMPILED, FOUND = "compiled", "found in the cache"
"""How a model came about."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call: the shape of each input, also of those that stand for absent ones, and the named `axes`."""

    shapes: Mapping[str, tuple[int, ...]]
    given: Sequence[str]
    axes: Mapping[str, int]

    @property
    def name(self) -> str:
        """The shapes of what was given, which decide all others, as the key of a cached model has them."""
        return " ".join(f"{name}={'x'.join(map(str, self.shapes[name]))}" for name in sorted(self.given))

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in self.axes.items())


class Made(Protocol):
    """A compiled model."""

    @property
    def origin(self) -> str:
        """How it came about: `COMPILED` or `FOUND`."""


M = TypeVar("M", bound=Made)


@dataclass
class Buckets(Generic[M]):
    """The compiled models of one program; `make` gives that for some sizes, or for all (None).

    Safe to call from several threads.
    """

    make: Callable[[Sizes | None], M]
    fits: Callable[[], bool] = lambda: True
    """Whether there is memory for a further model."""
    alone: Callable[[Sizes], bool] = lambda _: True
    """Whether a size may have one of its own at all."""
    most: int = MOST
    again: int = AGAIN
    history: list[str] = field(default_factory=list)
    """One sentence for each model that was made or given up, in order."""
    memory: Callable[[], int | None] = own_memory
    """What this process holds now, to say what each model adds: engines pack weights anew for it (bytes)."""
    own: OrderedDict[str, M] = field(default_factory=OrderedDict)
    common: M | None = None
    calls: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, sizes: Sizes) -> M:
        """The model to call for these sizes, made now if need be."""
        with self.lock:
            self.calls[sizes.name] += 1
            if (found := self.own.get(sizes.name)) is not None:
                self.own.move_to_end(sizes.name)
                return found
            if (why := self._reason(sizes.name)) is None or not self.alone(sizes):
                return self._shared(sizes)
            self._leave(self.most - 1)  # first, for its memory
            made, memory = self._made(sizes)
            self.own[sizes.name] = made
            self.history.append(f"{sizes}: {made.origin}, for this size alone, {why}{memory}")
            return made

    def _reason(self, name: str) -> str | None:
        """Why a size gets a model of its own now, or None."""
        if not self.most:
            return None
        if not self.own and self.common is None:
            return "the first that was called"
        if self.calls[name] <= self.again or not self.fits():
            return None
        return f"called {self.again} times before" if self.again else "at its first call"

    def _shared(self, sizes: Sizes) -> M:
        if self.common is None:
            if not self.fits():
                self._leave(0)
            self.common, memory = self._made(None)
            self.history.append(f"{sizes}: {self.common.origin}, for all sizes{memory}")
        return self.common

    def _made(self, sizes: Sizes | None) -> tuple[M, str]:
        """A further model, and what memory it took, where the system tells and it is much."""
        further, before = bool(self.own) or self.common is not None, self.memory()
        made = self.make(sizes)
        after = self.memory()
        if before is None or after is None or after - before < TELLING:
            return made, ""
        return made, f", in {(after - before) / 1e6:.0f} MB of its own{UNSHARED * further}"

    def _leave(self, most: int) -> None:
        while len(self.own) > most:
            name, _ = self.own.popitem(last=False)
            self.calls[name] = 0
            self.history.append(f"{name}: its model was given up, as it was not called for longest")

    def spare(self, wish: OwnSizes) -> None:
        """Let at most that many sizes have a model of their own from now on."""
        with self.lock:
            self.most = wish.most
            self._leave(wish.most)
