"""IP-Adapters (Ye et al. 2023, arXiv:2308.06721) from their files: what they make of an encoded picture.

Three kinds are known by their names: tokens from the picture's embedding ("base"), from its states by an MLP ("full
face"), and from its states by a resampler ("plus"). All this is computed once per picture, in float32 and NumPy, so
that an engine needs nothing of it but the keys and values. No PyTorch here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import to_numpy
from anamorph.errors import CheckpointError, InputError
from anamorph.native import attentions

F32 = NDArray[np.float32]
Weights = Mapping[str, F32]

PROJECTION, LAYERS = "image_proj", "ip_adapter"
"""What every adapter's file has: the projection of pictures, and the keys and values of layers."""
HEAD_WIDTH = 64
"""Of the resampler's attention, in every published adapter."""
BASE_TOKENS = 4
"""Tokens that the plain projection makes of a picture, in every published adapter."""
EPSILON = 1e-5
"""Of all norms."""


@dataclass(frozen=True)
class Kind:
    """How one kind of adapter makes tokens.

    `states`: whether of the picture's states before the encoder's last layer, [n, S, E], rather than its embedding
    [n, E]. `project` gives tokens [n, T, C], `width` is E.
    """

    name: str
    states: bool
    project: Callable[[Weights, F32], F32]
    width: Callable[[Weights], int]


@dataclass(frozen=True)
class Adapter:
    """One adapter: its kind, its projection's weights, and those of the keys and values of each attention, in the
    order in which these lie side by side, [sum of widths, C].
    """  # fmt: skip

    kind: Kind
    projection: Weights
    keys: F32
    values: F32

    @property
    def width(self) -> int:
        """Width of the embeddings, or states, of pictures that it takes."""
        return self.kind.width(self.projection)

    def seen(self, embeds: F32) -> tuple[F32, F32]:
        """Keys and values of all attentions for pictures [n, E] or [n, S, E], [n, T, sum of widths] twice."""
        tokens = self.kind.project(self.projection, embeds)
        return tokens @ self.keys.T, tokens @ self.values.T


def adapter_of(state: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Adapter:
    """An adapter from what its file holds, for a UNet of that configuration.

    Raises CheckpointError: it is no adapter, of a kind that is not served, or damaged. Raises InputError: it is for
    another UNet.
    """
    projection, layers = (_floats(state, half, where) for half in (PROJECTION, LAYERS))
    kind = _kind(projection, where)
    keys, values = (_joined(layers, name, config, where) for name in ("to_k_ip", "to_v_ip"))
    adapter = Adapter(kind, projection, keys, values)
    try:  # every weight of the projection takes part, and must fit the others
        adapter.seen(np.zeros((1, 2, adapter.width)[:: 1 if kind.states else 2], np.float32))
    except KeyError as error:
        raise CheckpointError(f"{where} has no {PROJECTION}.{error.args[0]}; download it again") from None
    except (ValueError, IndexError):
        raise CheckpointError(
            f"{where} has weights of {PROJECTION} that do not fit each other, or this UNet; expected those of a "
            f"{kind.name} adapter for texts of {config['cross_attention_dim']} numbers"
        ) from None
    return adapter


def _floats(state: Mapping[str, Any], half: str, where: str) -> dict[str, F32]:
    """One half of a file, whether it is a mapping of its own or told by how names begin."""
    found = state.get(half)
    if not isinstance(found, Mapping):
        found = {name[len(half) + 1 :]: value for name, value in state.items() if name.startswith(f"{half}.")}
    if not found:
        raise CheckpointError(f"{where} holds no {half}, which every IP-Adapter has; name the adapter's own file")
    arrays = {name: np.asarray(to_numpy(value), np.float32) for name, value in found.items()}
    if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise CheckpointError(f"{where} holds NaN or infinity in {half}.{bad[0]}; download it again")
    return arrays


def _kind(projection: Weights, where: str) -> Kind:
    if "perceiver_resampler.proj_in.weight" in projection or {"norm.weight", "proj.2.weight"} <= set(projection):
        raise CheckpointError(
            f"{where} is a FaceID adapter, which looks at faces' identities; expected one that looks at pictures: "
            "plain, plus or full-face"
        )
    for name, kind in KINDS.items():
        if name in projection:
            return kind
    raise CheckpointError(f"{where} is an IP-Adapter of an unknown kind; its projection needs {' or '.join(KINDS)}")


def _joined(layers: Weights, name: str, config: Mapping[str, Any], where: str) -> F32:
    """The weights of all attentions side by side.

    Files count attentions of both kinds, down, up and middle: those to the text have the numbers 1, 3, 5 ...
    """
    places = attentions(config)
    order = sorted(range(len(places)), key=lambda index: places[index].name.startswith("mid_block"))
    found: dict[int, list[F32]] = {}
    number = 1
    for index in order:
        for _ in range(places[index].depth):
            key, width = f"{number}.{name}.weight", places[index].width
            shape = (width, config["cross_attention_dim"])
            if key not in layers:
                raise InputError(f"{where} has no {LAYERS}.{key}; it was made for another UNet, with fewer attentions")
            if layers[key].shape != shape:
                raise InputError(
                    f"{where}: {LAYERS}.{key} has shape {list(layers[key].shape)}, expected {list(shape)}; it was made "
                    "for another UNet"
                )
            found.setdefault(index, []).append(layers[key])
            number += 2
    if f"{number}.{name}.weight" in layers:
        raise InputError(f"{where} has keys for more than {number // 2} attentions; it was made for another UNet")
    return np.concatenate([weight for index in range(len(places)) for weight in found[index]])


def _linear(weights: Weights, name: str, x: F32) -> F32:
    """W x + b, or W x where there is no b."""
    y: F32 = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _norm(weights: Weights, name: str, x: F32) -> F32:
    """Layer normalisation over the last dimension (Ba et al. 2016, arXiv:1607.06450)."""
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(EPSILON))
    y: F32 = scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return y


def _gelu(x: F32) -> F32:
    """x (1 + erf(x / sqrt 2)) / 2."""
    waves = np.asarray(np.frompyfunc(math.erf, 1, 1)(x.astype(np.float64) / math.sqrt(2)), np.float64)
    y: F32 = (0.5 * x * (1 + waves)).astype(np.float32)
    return y


def _plain(weights: Weights, embeds: F32) -> F32:
    """norm(W e + b) as four tokens: [n, E] -> [n, 4, C]."""
    return _norm(weights, "norm", _linear(weights, "proj", embeds).reshape(len(embeds), BASE_TOKENS, -1))


def _full(weights: Weights, states: F32) -> F32:
    """norm(W_2 gelu(W_1 s)) for each state: [n, S, E] -> [n, S, C]."""
    return _norm(weights, "proj.3", _linear(weights, "proj.2", _gelu(_linear(weights, "proj.0", states))))


def _resampled(weights: Weights, states: F32) -> F32:
    """Learned tokens that look at the states and at themselves, layer by layer: [n, S, E] -> [n, T, C].

    Source: Alayrac et al. 2022 (arXiv:2204.14198), section 3.1.
    """
    x = _linear(weights, "proj_in", states)
    tokens = np.repeat(weights["latents"], len(states), axis=0)
    layer = 0
    while f"layers.{layer}.0.to_q.weight" in weights:
        look, think = f"layers.{layer}.0", f"layers.{layer}.1"
        tokens = tokens + _looked(weights, look, x, tokens)
        inner = _gelu(_linear(weights, f"{think}.1", _norm(weights, f"{think}.0", tokens)))
        tokens = tokens + _linear(weights, f"{think}.3", inner)
        layer += 1
    return _norm(weights, "norm_out", _linear(weights, "proj_out", tokens))


def _looked(weights: Weights, name: str, x: F32, tokens: F32) -> F32:
    """softmax(Q K^T / sqrt(d)) V with queries of the tokens, and keys and values of the states and the tokens."""
    own = _norm(weights, f"{name}.norm2", tokens)
    every = np.concatenate([_norm(weights, f"{name}.norm1", x), own], axis=1)
    q = _heads(_linear(weights, f"{name}.to_q", own))
    k, v = (_heads(half) for half in np.split(_linear(weights, f"{name}.to_kv", every), 2, axis=-1))
    scores = q @ k.swapaxes(-1, -2) / np.float32(math.sqrt(HEAD_WIDTH))
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (shares / shares.sum(-1, keepdims=True)) @ v
    return _linear(weights, f"{name}.to_out", mixed.swapaxes(1, 2).reshape(*own.shape[:2], -1))


def _heads(x: F32) -> F32:
    """[n, S, heads d] -> [n, heads, S, d]."""
    return x.reshape(*x.shape[:2], -1, HEAD_WIDTH).swapaxes(1, 2)


KINDS: Mapping[str, Kind] = {
    "proj.weight": Kind("base", False, _plain, lambda weights: int(weights["proj.weight"].shape[1])),
    "proj.3.weight": Kind("full face", True, _full, lambda weights: int(weights["proj.0.weight"].shape[1])),
    "latents": Kind("plus", True, _resampled, lambda weights: int(weights["proj_in.weight"].shape[1])),
}
"""The weight by which a kind is known -> the kind."""
