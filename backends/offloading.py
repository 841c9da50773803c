"""Weights of PyTorch models that wait in host memory and visit a device only while they are needed.

Nothing is ever copied back: weights do not change, so what a device holds is dropped and the host's own stay.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from anamorph.memory import Offload


def copied(weight: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
    """A weight on the device."""
    return weight.to(device, non_blocking=non_blocking)


class Lane:
    """How weights travel: in the queue of the computation that waits for them."""

    def __init__(self, device: torch.device, *, ahead: bool = False) -> None:
        self.device, self.ahead = device, ahead

    def home(self, weight: Tensor) -> Tensor:
        """Where a weight waits in host memory."""
        return weight.to("cpu")

    def bring(self, homes: Sequence[Tensor]) -> list[Tensor]:
        """Begin to copy weights to the device."""
        return [copied(home, self.device, non_blocking=self.ahead) for home in homes]

    def arrived(self, weights: Sequence[Tensor]) -> None:
        """What follows on the device may use these weights."""


class Prefetch(Lane):
    """How weights travel in a CUDA stream of their own, from page-locked memory, while others compute."""

    def __init__(self, device: torch.device, *, lean: bool = False) -> None:
        super().__init__(device, ahead=True)
        self.lean = lean
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def home(self, weight: Tensor) -> Tensor:
        return weight.to("cpu") if self.lean else weight.to("cpu").pin_memory()

    def bring(self, homes: Sequence[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(self.stream):
            locked = [home.pin_memory() for home in homes] if self.lean else homes
            return [copied(home, self.device, non_blocking=self.ahead) for home in locked]

    def arrived(self, weights: Sequence[Tensor]) -> None:
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for weight in weights:
            weight.record_stream(computing)  # its memory is not given away before this queue has used it


class Piece:
    """Weights that travel together."""

    def __init__(self, weights: Iterable[Tensor], lane: Lane) -> None:
        self.weights, self.lane = list(weights), lane
        self.homes = [lane.home(weight.data) for weight in self.weights]
        self.coming: list[Tensor] | None = None
        self.present = False
        self.leave()

    def send_for(self) -> None:
        """Begin to copy, unless that has begun."""
        if self.coming is None:
            with torch.inference_mode(False):  # weights outlive the call that fetched them
                self.coming = self.lane.bring(self.homes)

    def fetch(self) -> None:
        """Be on the device."""
        self.send_for()
        assert self.coming is not None
        self.lane.arrived(self.coming)
        _point(self.weights, self.coming)
        self.present = True

    def leave(self) -> None:
        """Be in host memory alone."""
        _point(self.weights, self.homes)
        self.coming, self.present = None, False


def _point(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.data = value


class Turn:
    """One device, where of all models that take turns only the one that was called last stays."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.last: ReferenceType[Piece] | None = None

    def take(self, piece: Piece) -> None:
        """Send the last one home and fetch this one."""
        last = None if self.last is None else self.last()
        if last is piece and piece.present:
            return
        if last is not None:
            last.leave()
        piece.fetch()
        self.last = ref(piece)


_turns: dict[str, Turn] = {}
_offloaded: "WeakKeyDictionary[nn.Module, Offloaded]" = WeakKeyDictionary()


def offloaded(module: nn.Module) -> "Offloaded | None":
    """How a model's weights wait elsewhere, if they do."""
    return _offloaded.get(module)


def offload(module: nn.Module, wish: Offload) -> None:
    """Let a model's weights wait in host memory; with kind None they no longer leave it."""
    before = _offloaded.pop(module, None)
    if before is not None:
        before.end()
    if wish.kind is not None:
        _offloaded[module] = Offloaded(module, wish)


class Offloaded:
    """The pieces of one model: the `rest` is there during a whole call, the others while their modules run."""

    def __init__(self, module: nn.Module, wish: Offload) -> None:
        named = torch.device(wish.device)
        self.wish, self.device = wish, torch.device(named.type, named.index or 0)
        self.turn = _turns.setdefault(str(self.device), Turn()) if wish.kind == "model" else None
        self.lock = threading.RLock() if self.turn is None else self.turn.lock
        lane = Prefetch(self.device, lean=wish.lean) if wish.stream else Lane(self.device, ahead=wish.ahead)
        self.handles: list[Any] = []
        self.pieces: list[Piece] = []
        self.following: dict[Piece, Piece] = {}
        self.latest: Piece | None = None
        taken: set[int] = set()
        for modules, weights in _groups(module, wish):
            self._add(modules, Piece(weights, lane))
            taken.update(map(id, weights))
        self.rest = Piece([weight for weight in _weights(module) if id(weight) not in taken], lane)

    def _add(self, modules: Sequence[nn.Module], piece: Piece) -> None:
        self.pieces.append(piece)
        self.handles += [one.register_forward_pre_hook(lambda *_: self._fetch(piece)) for one in modules]
        self.handles.append(modules[-1].register_forward_hook(lambda *_: piece.leave(), always_call=True))
        # A layer of a block may also be called from outside of it.
        inside = [layer for one in modules for layer in one.modules() if layer is not one and [*_own(layer)]]
        for layer in inside:
            self.handles += _visits(layer, piece)

    def _fetch(self, piece: Piece) -> None:
        """Fetch a piece and, where another one followed it before and a stream can copy it meanwhile, send for that."""
        if piece.present:  # another block of the group has fetched it
            return
        piece.fetch()
        if self.wish.stream:
            if self.latest is not None:
                self.following.setdefault(self.latest, piece)
            self.latest = piece
            if (following := self.following.get(piece)) is not None:
                following.send_for()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """While this lasts, the model can be called; calls of several threads wait for one another."""
        with self.lock:
            if self.turn is not None:
                self.turn.take(self.rest)
                yield
                return
            self.rest.fetch()
            try:
                yield
            finally:
                self.latest = None
                for piece in (self.rest, *self.pieces):
                    piece.leave()

    def end(self) -> None:
        """Take the hooks away; all weights are in host memory."""
        for handle in self.handles:
            handle.remove()
        for piece in (self.rest, *self.pieces):
            piece.leave()


def _visits(layer: nn.Module, piece: Piece) -> list[Any]:
    """Hooks that fetch a piece for one of its layers alone, where it is not there."""
    alone: list[bool] = []

    def before(*_: Any) -> None:
        alone.append(not piece.present)
        if alone[-1]:
            piece.fetch()

    def after(*_: Any) -> None:
        if alone.pop():
            piece.leave()

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)]


Groups = Iterable[tuple[Sequence[nn.Module], list[Tensor]]]


def _groups(module: nn.Module, wish: Offload) -> Groups:
    """The modules that run one after another, and the weights that they need meanwhile."""
    if wish.kind == "block_level":
        for blocks in _lists(module):
            members = list(blocks.children())
            for first in range(0, len(members), wish.blocks):
                group = members[first : first + wish.blocks]
                yield group, [weight for member in group for weight in _weights(member)]
    elif wish.kind in ("sequential", "leaf_level"):
        for layer in module.modules():
            own = [*_own(layer)]
            # Embeddings are also read without being called, by the module that holds them.
            own += [weight for child in layer.children() if isinstance(child, nn.Embedding) for weight in _own(child)]
            if own and layer is not module and not isinstance(layer, nn.Embedding):
                yield [layer], own


def _lists(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost lists of blocks."""
    for child in module.children():
        listed = isinstance(child, nn.ModuleList | nn.Sequential)
        if listed and not any(isinstance(member, nn.ModuleDict) for member in child.children()):  # these are no layers
            yield child
        else:
            yield from _lists(child)


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _weights(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
