"""Products with weights by oneDNN: the rewrite "onednn-linear"."""

import torch
from torch import Tensor, nn

from anamorph.rewrites import ONEDNN

HERE = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)
"""Whether PyTorch has oneDNN, with its product."""


def multiplies(device: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes such products; those of narrower floats PyTorch gives to it by itself."""
    return HERE and device == "cpu" and dtype == torch.float32


@torch.library.custom_op("anamorph::onednn_linear", mutates_args=())
def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN: [..., in], [out, in], [out] -> [..., out].

    An operation of our own, because Inductor takes PyTorch's for one whose weights are constants of the graph.
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@product.register_fake
def _(x: Tensor, weight: Tensor, _bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


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
        y: Tensor = product(x, self.weight, self.bias)
        return y
