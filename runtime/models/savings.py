"""Memory that an autoencoder need not take: one picture, or one tile of it, at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from anamorph.tiling import Operations, Tiles, sparing


class Savings:
    """Switches of an autoencoder; off until they are enabled."""

    use_slicing = False
    """Whether the pictures of a batch go one after another."""
    use_tiling = False
    """Whether pictures larger than the configuration's `sample_size` go in tiles that overlap."""

    def enable_slicing(self) -> None:
        """Take the pictures of a batch one after another; the results are the same."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Take all pictures of a batch at once."""
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Take large pictures in overlapping tiles; near the seams the results differ a little."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Take pictures whole, whatever their size."""
        self.use_tiling = False

    def saving(self, call: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles) -> Tensor:
        """`call` on x [B, C, h, w] as the switches say."""
        result: Tensor = sparing(call, x, tiles, operations_at(x), slicing=self.use_slicing, tiling=self.use_tiling)
        return result


def operations_at(x: Tensor) -> Operations:
    """PyTorch's operations on the device and in the type of `x`."""
    return Operations(
        lambda parts, axis: torch.cat(list(parts), dim=axis), lambda numbers: torch.from_numpy(numbers).to(x)
    )
