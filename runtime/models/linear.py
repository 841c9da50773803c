"""Products with weights by oneDNN: the rewrite "onednn-linear"."""

import torch
from torch import Tensor, nn

from anamorph.rewrites import ONEDNN

HERE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether PyTorch has oneDNN, with its product."""


def multiplies(device: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes such products; those of narrower floats PyTorch gives to it by itself."""
    return HERE and device == "cpu" and dtype == torch.float32


class Linear(nn.Linear):
    """PyTorch's, which obeys the rewrite where no gradients are asked for: [..., in] -> [..., out].

    PyTorch leaves products in float32 to MKL, whose fast kernels are for Intel's processors alone. oneDNN, which
    computes PyTorch's convolutions, was twice as fast on AMD's (180 and 380 of 414 GFLOP/s).
    """

    REWRITE = ONEDNN
    rewritten = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.rewritten or torch.is_grad_enabled() or not multiplies(x.device.type, x.dtype):
            return super().forward(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y
