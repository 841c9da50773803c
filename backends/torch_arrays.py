"""Arrays of PyTorch on one device."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


class TorchArrays:
    """Tensors that stay on `device` between the calls of components."""

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self.key = f"torch:{device}"
        self.asynchronous = device.type != "cpu"

    def put(self, value: NDArray[Any]) -> "torch.Tensor":
        import torch

        return torch.from_numpy(np.require(value, requirements=["C", "W"])).to(self.device)

    def accept(self, value: Any) -> "torch.Tensor":
        import torch

        if isinstance(value, torch.Tensor):
            return value.to(self.device, torch.float32)
        return self.put(np.asarray(value, dtype=np.float32))

    def get(self, value: "torch.Tensor") -> NDArray[Any]:
        return value.detach().cpu().numpy()

    def concat(self, values: Sequence["torch.Tensor"], axis: int = 0) -> "torch.Tensor":
        import torch

        return torch.cat(list(values), axis)

    def finite(self, value: "torch.Tensor") -> Any:
        import torch

        return torch.isfinite(value).all()
