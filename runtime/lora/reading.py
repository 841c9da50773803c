"""Reading adapters: a file, a folder, a hub id or tensors by name, to changes of the layers of a pipeline's models."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from anamorph.arrays import to_numpy
from anamorph.config import read_json
from anamorph.errors import CheckpointError, InputError
from anamorph.hub import HubOptions, find_component
from anamorph.lora.factors import Factors, Floats, Layers, loha, lora
from anamorph.lora.names import other_kind, parted
from anamorph.original.reading import SUFFIXES, open_original
from anamorph.weights import Stored, floats, safetensors_metadata

FILES = (
    "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin",
)  # fmt: skip
"""What folders and hub ids hold, unless a name is given."""
PEFT_CONFIG, METADATA = "adapter_config.json", "lora_adapter_metadata"
SHOWN = 8
"""How many names a message lists."""


@dataclass(frozen=True)
class Scales:
    """What PEFT's configuration says about alpha; without it, alpha is the rank."""

    config: Mapping[str, Any] = field(default_factory=dict)

    def of(self, layer: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) where the adapter was trained so (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = _matching(self.config.get("alpha_pattern"), layer, self.config.get("lora_alpha"))
        if alpha is None:
            return 1.0
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    return next(
        (value for key, value in (patterns or {}).items() if layer == key or layer.endswith(f".{key.lstrip('^')}")),
        default,
    )


@dataclass(frozen=True)
class Source:
    """An adapter's tensors by their names, what it says about scales for each component, and what errors call it."""

    name: str
    tensors: Mapping[str, Floats]
    scales: Mapping[str, Scales]

    def scale(self, component: str, layer: str, rank: int) -> float:
        """What its configuration says."""
        return self.scales.get(component, self.scales.get("", Scales())).of(layer, rank)


def read_source(source: Any, weight_name: str | None, subfolder: str | None, hub: HubOptions) -> Source:
    """Open an adapter; tensors of floating point stay mapped from their file.

    Raises CheckpointError: there is no such file, or it is damaged, holds code, or an adapter of a kind that is not
    served. Raises InputError: it is no adapter at all.
    """
    if isinstance(source, Mapping):
        return Source("the adapter", {name: to_numpy(value) for name, value in source.items()}, {})
    path = find_adapter(source, weight_name, subfolder, **hub)
    tensors = {name: _mapped(stored, path) for name, stored in open_original(path).tensors.items()}
    return Source(str(path), tensors, _scales(path))


def find_adapter(
    source: Any, weight_name: str | None = None, subfolder: str | None = None, **hub: Unpack[HubOptions]
) -> Path:
    """The file of an adapter: itself, or in a folder or hub id that of the usual name, or the only one.

    Raises CheckpointError: there is none. Raises InputError: the source is of another kind.
    """
    if not isinstance(source, str | Path):
        raise InputError(f"an adapter is a file, a folder, a hub id or tensors by name, got a {type(source).__name__}")
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise CheckpointError(f"{path} ends in {path.suffix or 'nothing'}, expected {', '.join(SUFFIXES)}")
        return path
    names = (weight_name,) if weight_name else FILES
    folder = find_component(source, subfolder, (*names, PEFT_CONFIG), **hub)
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found and not weight_name:
        found = sorted(folder.glob("*.safetensors"))
        if len(found) > 1:
            raise CheckpointError(
                f"{folder} holds {', '.join(one.name for one in found[:SHOWN])}; name one with weight_name="
            )
    if not found:
        raise CheckpointError(f"{folder} has no {' and no '.join(names)}; name the file with weight_name=")
    return found[0]


def _mapped(stored: Stored, path: Path) -> Floats:
    return stored.values if stored.dtype == "F16" else floats(stored, path)


def _scales(path: Path) -> dict[str, Scales]:
    """Component ("" for all) -> what the file's metadata, or PEFT's configuration beside it, says."""
    beside = path.parent / PEFT_CONFIG
    if path.name.startswith("adapter_model.") and beside.is_file():
        config = read_json(beside)
        if refused := [key for key in ("use_dora", "fan_in_fan_out") if config.get(key)]:
            raise CheckpointError(f"{beside} says {refused[0]}, which is not served; merge the adapter with PEFT")
        return {"": Scales(config)}
    text = safetensors_metadata(path).get(METADATA) if path.suffix == ".safetensors" else None
    if text is None:
        return {}
    try:
        values: dict[str, Any] = json.loads(text)
        parts = {key.split(".", 1)[0] for key in values}
        return {
            part: Scales({key.split(".", 1)[1]: value for key, value in values.items() if key.startswith(f"{part}.")})
            for part in parts
        }
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has damaged metadata {METADATA} ({error}); download it again") from None


@dataclass(frozen=True)
class Home:
    """A model that can be changed: the spellings of its layers, and the shapes of their weights."""

    spelled: Mapping[str, str]
    layers: Layers


Found = dict[tuple[str, str], dict[str, Floats]]
"""Component and layer -> role -> tensor."""


def changes_of(source: Source, homes: Mapping[str, Home]) -> dict[str, dict[str, Factors]]:
    """Component -> what the adapter changes in it.

    Raises InputError: a tensor belongs to no layer, a factor is missing, does not fit its layer or is not finite.
    """
    if (kind := other_kind(source.tensors)) is not None:
        raise InputError(f"{source.name} is an adapter of another kind ({kind}); LoRA, LoCon and LoHa are served")
    found: Found = {}
    strange = []
    for name, value in source.tensors.items():
        place = _place(name, homes)
        if place is None:
            strange.append(name)
        else:
            found.setdefault(place[:2], {})[place[2]] = value
    if strange or not found:
        listed = f"{', '.join(strange[:SHOWN])}{f' and {len(strange) - SHOWN} more' if len(strange) > SHOWN else ''}"
        have = f"{len(strange)} of its {len(source.tensors)} tensors belong to no layer of {', '.join(homes)}: {listed}"
        raise InputError(f"{source.name} does not fit this pipeline: {have if strange else 'it holds no tensors'}; "
                         "it was made for another model")  # fmt: skip
    changes: dict[str, dict[str, Factors]] = {component: {} for component, _ in found}
    for (component, layer), roles in found.items():
        shape = homes[component].layers[layer]
        try:
            changes[component][layer] = _factors(roles, shape, lambda rank: source.scale(component, layer, rank))  # noqa: B023
        except InputError as error:
            raise InputError(f"{source.name} does not fit {layer} of {component}: {error}") from None
    return changes


def _place(name: str, homes: Mapping[str, Home]) -> tuple[str, str, str] | None:
    if (place := parted(name)) is None:
        return None
    component, layer, role = place
    candidates = homes if component is None else [component] if component in homes else []
    return next(((one, homes[one].spelled[layer], role) for one in candidates if layer in homes[one].spelled), None)


def _factors(roles: Mapping[str, Floats], shape: tuple[int, ...], scale: Any) -> Factors:
    for role, value in roles.items():
        if not np.isfinite(value).all():
            raise InputError(f"its factor {role!r} holds NaN or infinity")
        if value.ndim < 2 and role != "alpha":
            raise InputError(f"its factor {role!r} has shape {list(value.shape)}")
    hadamard = any(role.endswith(("_1", "_2")) for role in roles)
    needed = ("down_1", "up_1", "down_2", "up_2") if hadamard else ("down", "up")
    if missing := [role for role in needed if role not in roles]:
        raise InputError(f"its factor {missing[0]!r} is missing")
    rank = len(roles[needed[0]])
    alpha = roles.get("alpha")
    factor = scale(rank) if alpha is None else float(np.asarray(alpha).reshape(-1)[0]) / rank
    if hadamard:
        return loha([(roles["up_1"], roles["down_1"]), (roles["up_2"], roles["down_2"])], factor, shape)
    return lora(roles["down"], roles["up"], roles.get("mid"), factor, shape)
