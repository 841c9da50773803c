"""Kernels of attention by name: PyTorch's own, one of them insisted upon, or xformers'."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from anamorph.errors import BackendError

PYTORCH: Mapping[str, str] = MappingProxyType({
    "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH", "cudnn": "CUDNN_ATTENTION",
})  # fmt: skip
"""Name of a kernel of `scaled_dot_product_attention` -> PyTorch's name for it (torch.nn.attention.SDPBackend)."""
XFORMERS = "xformers"
NAMES = (*PYTORCH, XFORMERS)
ONE = "one operation"
"""The kernel that graphs name as one operation, which their engine has a kernel for."""
Attend = Callable[..., Tensor]
"""From q [B, heads, S, d], k and v [B, heads, T, d], `attn_mask` and `is_causal` to [B, heads, S, d]."""


def kernel(name: str) -> Attend:
    """Attention by that kernel and no other. Calls raise BackendError where it does not take them here."""
    own = {XFORMERS: by_xformers, ONE: as_one}
    return own[name] if name in own else _insisting(name)


@torch.library.custom_op("anamorph::attention", mutates_args=())
def traced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as one operation of a graph: q [B, heads, S, d], k and v [B, heads, T, d] -> [B, heads, S, d]."""
    return F.scaled_dot_product_attention(q, k, v).contiguous()


@traced.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001
    return q.new_empty(q.shape)


def as_one(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attention as one operation where nothing is masked."""
    if attn_mask is not None or is_causal:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    mixed: Tensor = traced(q, k, v)
    return mixed


def _insisting(name: str) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        try:
            with sdpa_kernel([getattr(SDPBackend, PYTORCH[name])]):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        except RuntimeError as error:
            raise BackendError(
                f"attention by {name} does not take {str(q.dtype).removeprefix('torch.')} of {q.shape[-1]} channels on "
                f"{q.device} ({str(error).splitlines()[0]}); leave the option attention out"
            ) from error

    return attend


def by_xformers(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """xformers' memory-efficient attention, whose heads come after the tokens.

    Raises BackendError: it is not installed, or does not take these tensors.
    """
    try:
        from xformers import ops  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise BackendError(f"xformers cannot be imported ({error}); run: pip install xformers") from None
    bias = None if attn_mask is None else attn_mask.expand(*q.shape[:2], q.shape[2], k.shape[2])
    if is_causal:
        bias = torch.full((q.shape[2], k.shape[2]), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        bias = bias.expand(*q.shape[:2], *bias.shape)
    try:
        mixed: Tensor = ops.memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=bias)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"attention by xformers does not take this ({reason}); leave the option out") from error
    return mixed.transpose(1, 2)
