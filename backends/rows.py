"""Parts of a batch: for engines that take no more than some rows at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

from anamorph.arrays import Array
from anamorph.interface import Axis, Interface, Port

BATCH = "batch"


def batch_axis(port: Port) -> int | None:
    """Which dimension of a port counts the rows, or None."""
    names = [axis.name if isinstance(axis, Axis) else None for axis in port.axes]
    return names.index(BATCH) if BATCH in names else None


def rows_of(interface: Interface, values: Mapping[str, Array], rows: Sequence[int]) -> dict[str, Any]:
    """These rows of each input that has rows; the others, and terms that broadcast to all rows, as they are."""
    axes = {port.name: batch_axis(port) for port in interface.inputs}

    def part(value: Any, axis: int | None) -> Any:
        if axis is None or value.shape[axis] == 1:
            return value
        return value[(slice(None),) * axis + (list(rows),)]

    return {name: part(value, axes[name]) for name, value in values.items()}
