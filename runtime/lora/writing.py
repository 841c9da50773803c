"""Writing trained factors as diffusers does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anamorph.arrays import to_numpy
from anamorph.errors import InputError
from anamorph.files import replacing
from anamorph.weights import Stored, write_safetensors


def write_factors(path: Path, factors: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Component -> (a layer's name with ".lora_A.weight" or ".lora_B.weight" -> tensor) as one file.

    In float32, but for arrays of float16, which stay so.
    Raises InputError: there are none. Raises OutputError: the file cannot be written.
    """
    tensors = {
        f"{component}.{name}": _stored(to_numpy(value))
        for component, layers in factors.items()
        for name, value in (layers or {}).items()
    }
    if not tensors:
        raise InputError("there are no factors to save; pass those of the UNet or of a text encoder")
    with replacing(path) as draft:
        write_safetensors(draft, tensors)


def _stored(values: NDArray[Any]) -> Stored:
    return Stored(values, "F16") if values.dtype == np.float16 else Stored(values.astype(np.float32), "F32")
