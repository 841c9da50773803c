"""Operations of a traced model as functions of JAX, by PyTorch's names and with its arguments."""

import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Function = Callable[..., Any]


def convolution(
    x: Array, weight: Array, bias: Array | None = None, stride: Sequence[int] = (1, 1), padding: Any = (0, 0),
    dilation: Sequence[int] = (1, 1), groups: int = 1,
) -> Array:  # fmt: skip
    sides = [(size, size) for size in padding]
    out = lax.conv_general_dilated(
        x, weight, tuple(stride), sides, rhs_dilation=tuple(dilation), feature_group_count=groups
    )
    return out if bias is None else out + bias[:, None, None]


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    out = x @ weight.T
    return out if bias is None else out + bias


def layer_norm(
    x: Array, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Array:
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    out = (x - x.mean(axes, keepdims=True)) * lax.rsqrt(x.var(axes, keepdims=True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def group_norm(x: Array, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Array:
    apart = x.reshape(x.shape[0], groups, -1)
    normed = layer_norm(apart, (apart.shape[-1],), eps=eps).reshape(x.shape)
    column = (slice(None), *(None,) * (x.ndim - 2))
    normed = normed if weight is None else normed * weight[column]
    return normed if bias is None else normed + bias[column]


def attention(
    q: Array, k: Array, v: Array, attn_mask: Array | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None,
) -> Array:  # fmt: skip
    del dropout_p  # nothing is trained
    scores = jnp.einsum("...sd,...td->...st", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores + jnp.triu(jnp.full(scores.shape[-2:], -jnp.inf), 1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return jax.nn.softmax(scores, -1) @ v


def image_attention(q: Array, keys: Array, values: Array, bias: Array, mask: Array) -> Array:
    """See `anamorph.models.image_attention`; what is absent is zeros of size 1."""
    scale = q.shape[-1] ** -0.5
    k, v = (x.reshape(x.shape[0], -1, q.shape[1], q.shape[3]).swapaxes(1, 2) for x in (keys * scale, values))
    scores = (q @ k.swapaxes(-1, -2)).reshape(*q.shape[:3], *keys.shape[1:3])
    shares = jax.nn.softmax(scores + bias[:, None, None], -1)
    pixels = mask.reshape(*mask.shape[:2], -1).swapaxes(1, 2)[:, None, :, :, None]
    return (shares * (1 + pixels)).reshape(*q.shape[:3], -1) @ v


def nearest(x: Array, size: Sequence[int] | None, factors: Sequence[float] | None) -> Array:
    if size is None:
        assert factors is not None
        size = [int(side * factor) for side, factor in zip(x.shape[2:], factors, strict=True)]
    rows, columns = (jnp.arange(wanted) * have // wanted for wanted, have in zip(size, x.shape[2:], strict=True))
    return x[:, :, rows][:, :, :, columns]


def pad(x: Array, sides: Sequence[int], mode: str = "constant", value: float | None = None) -> Array:
    pairs = [tuple(sides[index : index + 2]) for index in range(0, len(sides), 2)]
    widths = [(0, 0)] * (x.ndim - len(pairs)) + pairs[::-1]
    return jnp.pad(x, widths) if mode == "constant" and not value else jnp.pad(x, widths, mode, constant_values=value)


def flatten(x: Array, start: int = 0, end: int = -1) -> Array:
    start, end = start % x.ndim, end % x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


def unflatten(x: Array, axis: int, sizes: Sequence[int]) -> Array:
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def expand(x: Array, sizes: Sequence[int]) -> Array:
    have = (1,) * (len(sizes) - x.ndim) + x.shape
    return jnp.broadcast_to(x, [old if size == -1 else size for size, old in zip(sizes, have, strict=True)])


def cut(x: Array, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    return x[(slice(None),) * (axis % x.ndim) + (slice(start, end, step),)]


def chunk(x: Array, count: int, axis: int = 0) -> list[Array]:
    width = -(-x.shape[axis] // count)
    return [cut(x, axis, begin, begin + width) for begin in range(0, x.shape[axis], width)]


def gelu(x: Array, approximate: str = "none") -> Array:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def typed(x: Array, dtype: Any = None, *_: Any, **named: Any) -> Array:
    wanted = named.get("dtype", dtype)
    return x if wanted is None else x.astype(str(wanted).removeprefix("torch."))


def arange(*bounds: Any, dtype: Any = None, **_: Any) -> Array:
    return jnp.arange(*bounds, dtype=None if dtype is None else str(dtype).removeprefix("torch."))


def scaled(function: Function) -> Function:
    """Addition and subtraction with PyTorch's factor for the second term."""
    return lambda a, b, alpha=1: function(a, b if alpha == 1 else alpha * b)


OPERATORS: Mapping[str, Function] = MappingProxyType({
    "aten.add.Tensor": scaled(operator.add), "aten.sub.Tensor": scaled(operator.sub), "aten.mul.Tensor": operator.mul,
    "aten.div.Tensor": operator.truediv, "aten.exp.default": jnp.exp, "aten.sin.default": jnp.sin,
    "aten.cos.default": jnp.cos, "aten.sigmoid.default": jax.nn.sigmoid, "aten.silu.default": jax.nn.silu,
    "aten.gelu.default": gelu, "aten.softmax.int": lambda x, axis, *_: jax.nn.softmax(x, axis),
    "aten.linear.default": linear, "aten.conv2d.default": convolution, "aten.group_norm.default": group_norm,
    "aten.layer_norm.default": layer_norm, "aten.scaled_dot_product_attention.default": attention,
    "anamorph.image_attention.default": image_attention,
    "aten.embedding.default": lambda table, ids, *_: table[ids], "aten.upsample_nearest2d.vec": nearest,
    "aten.pad.default": pad, "aten.cat.default": lambda values, axis=0: jnp.concatenate(values, axis),
    "aten.chunk.default": chunk, "aten.slice.Tensor": cut, "aten.select.int": lambda x, axis, n: jnp.take(x, n, axis),
    "aten.flatten.using_ints": flatten, "aten.unflatten.int": unflatten, "aten.expand.default": expand,
    "aten.reshape.default": jnp.reshape, "aten.view.default": jnp.reshape, "aten.transpose.int": jnp.swapaxes,
    "aten.permute.default": jnp.transpose, "aten.unsqueeze.default": jnp.expand_dims, "aten.squeeze.dim": jnp.squeeze,
    "aten.gather.default": lambda x, axis, at, **_: jnp.take_along_axis(x, at, axis),
    "aten.argmax.default": lambda x, axis=None, keepdim=False: jnp.argmax(x, axis, keepdims=keepdim),
    "aten.eq.Scalar": operator.eq, "aten.arange.default": arange, "aten.arange.start": arange,
    "aten.contiguous.default": typed, "aten.to.dtype": typed, "aten.to.dtype_layout": typed,
    "aten.clone.default": lambda x, **_: x, "aten.sym_size.int": lambda x, axis: x.shape[axis],
    "<built-in function add>": operator.add, "<built-in function sub>": operator.sub,
    "<built-in function mul>": operator.mul, "<built-in function floordiv>": operator.floordiv,
    "<built-in function getitem>": operator.getitem,
})  # fmt: skip
"""What the models of Stable Diffusion trace to; sizes are plain numbers while JAX compiles."""
