"""How a model's attention is computed, chosen under diffusers' names; the results are the same."""

from collections.abc import Mapping

from torch import nn

from anamorph.errors import InputError
from anamorph.models.attention import Sliceable, slice_attention
from anamorph.models.attention_kernels import NAMES


class AttnProcessor:
    """softmax(Q K^T / sqrt(d)) V step by step: all scores of a layer are in memory at once."""


class AttnProcessor2_0:  # noqa: N801 - diffusers' name
    """PyTorch's fused function, which models use unless told otherwise."""


Processor = AttnProcessor | AttnProcessor2_0


def attention_layers(module: nn.Module) -> dict[str, Sliceable]:
    """The attentions of a model, by the names of their processors in diffusers."""
    return {f"{name}.processor": one for name, one in module.named_modules() if isinstance(one, Sliceable)}


def processors(module: nn.Module) -> dict[str, Processor]:
    """How each attention of a model is computed."""
    layers = attention_layers(module)
    return {name: AttnProcessor2_0() if one.fused else AttnProcessor() for name, one in layers.items()}


def process_attention(module: nn.Module, processor: Processor | Mapping[str, Processor]) -> None:
    """Let all attention of a model be computed so, or each as its name says.

    Raises InputError: something is none of these classes, or names are not those of the model's attentions.
    """
    layers = attention_layers(module)
    given = dict(processor) if isinstance(processor, Mapping) else dict.fromkeys(layers, processor)
    if given.keys() != layers.keys():
        odd = min(given.keys() ^ layers.keys())
        raise InputError(f"{len(given)} processors are given for {len(layers)} attentions; {odd} has no counterpart")
    for name, each in given.items():
        if not isinstance(each, Processor):
            kind = type(each).__name__
            raise InputError(f"the attention processor is a {kind}, expected AttnProcessor() or AttnProcessor2_0()")
        layers[name].fused = isinstance(each, AttnProcessor2_0)


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
