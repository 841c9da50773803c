"""Formats that hold graphs of fixed sizes: which sizes each part is written for."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from anamorph.interface import Axis, Interface
from anamorph.probes import SEQUENCE


def fixed(interface: Interface) -> Interface:
    """The interface with one size for each axis: where several are left, a text of 77 tokens, and one of all else."""
    limits = {
        name: replace(axis, minimum=size, maximum=size, multiple=1)
        for name, axis in interface.axes.items()
        for size in [axis.minimum if name != "sequence" else min(axis.maximum or SEQUENCE, SEQUENCE)]
    }
    return interface.limited(limits)


def joined(interfaces: Sequence[Interface]) -> Interface:
    """One interface for all of these sizes; the axes span them."""
    first, lists = interfaces[0], [_sizes(each) for each in interfaces]
    varying = [name for name in first.axes if len({sizes[name] for sizes in lists}) > 1]
    if not varying:
        return first
    limits = {name: _span(name, [sizes[name] for sizes in lists]) for name in varying}
    listed = tuple(tuple((name, sizes[name]) for name in varying) for sizes in lists)
    return replace(first.limited(limits), sizes=tuple(dict.fromkeys(listed)))


def each_size(interface: Interface) -> Iterator[Interface]:
    """The interface for each of the sizes that it lists, or for the only one that it has."""
    for listed in interface.sizes or ((),):
        limits = {name: Axis(name, 1, size, size) for name, size in listed}
        yield replace(interface.limited(limits), sizes=())


def _sizes(interface: Interface) -> dict[str, int]:
    return {name: axis.minimum for name, axis in interface.axes.items()}


def _span(name: str, sizes: Sequence[int]) -> Axis:
    return Axis(name, math.gcd(*sizes), min(sizes), max(sizes))
