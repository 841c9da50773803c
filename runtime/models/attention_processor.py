"""How a model's attention is computed, chosen under diffusers' names; the results are the same."""

from torch import nn

from anamorph.errors import InputError
from anamorph.models.attention import Sliceable


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
