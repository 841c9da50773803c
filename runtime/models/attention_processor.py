"""How a model's attention is computed, chosen under diffusers' names; the results are the same."""

from torch import nn

from anamorph.errors import InputError
from anamorph.models.attention import Sliceable, slice_attention
from anamorph.models.attention_kernels import NAMES


class AttnProcessor:
    """softmax(Q K^T / sqrt(d)) V step by step: all scores of a layer are in memory at once."""


class AttnProcessor2_0:  # noqa: N801 - diffusers' name
    """PyTorch's fused function, which models use unless told otherwise."""


def process_attention(module: nn.Module, processor: AttnProcessor | AttnProcessor2_0) -> None:
    """Let all attention of a model be computed so; raises InputError where it is none of these classes."""
    if not isinstance(processor, AttnProcessor | AttnProcessor2_0):
        kind = type(processor).__name__
        raise InputError(f"the attention processor is a {kind}, expected AttnProcessor() or AttnProcessor2_0()")
    for layer in module.modules():
        if isinstance(layer, Sliceable):
            layer.fused = isinstance(processor, AttnProcessor2_0)


WAYS: dict[str, bool | str] = {"sdpa": True, "plain": False, **{name: name for name in NAMES}}
"""Name of a way to compute attention -> what layers are told; "sliced" is beside these."""
SLICED = "sliced"


def choose_attention(module: nn.Module, name: str) -> None:
    """Let all attention of a model be computed in the way of that name; "sliced" takes half of the heads at a time.

    Raises InputError: the name is unknown.
    """
    if name not in (*WAYS, SLICED):
        raise InputError(f"attention is {name!r}, expected one of {', '.join((*WAYS, SLICED))}")
    layers = [layer for layer in module.modules() if isinstance(layer, Sliceable)]
    for layer in layers:
        layer.fused = WAYS.get(name, True)
    if layers:
        slice_attention(module, "auto" if name == SLICED else None)
