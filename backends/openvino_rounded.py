"""Weights in bfloat16 for models that run in it.

OpenVINO rounds the weights of products when it compiles, and again at each start, for which it reads four bytes of
every weight that is stored in float32, and makes wide copies of those that are not. Here they are rounded once, into a
file of the user's cache that all graphs and sizes of a component share, and are multiplied as they are.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anamorph.artifact import Part
from anamorph.backends.memory import giving_back
from anamorph.entries import ANY, Entry, Key, find, keep
from anamorph.linked import LINKABLE, Linked, Place
from anamorph.weights import Entry as Tensor
from anamorph.weights import Stored, as_stored, floats, safetensors_entries

FILE = "weights.bin"
LAYOUT = 1
"""Raised whenever the same checkpoint becomes another file."""
WEIGHTS = {"MatMul": 1, "Convolution": 1, "Gather": 0}
"""Operations -> the number of the input that a weight comes in by."""
WIDE = ("F32", "F16")
WIDTH = 2
"""Bytes of a rounded number."""


def rounded(part: Part, checkpoint: Path) -> dict[str, Linked] | None:
    """The matrices among a part's linked weights, mapped from their copy, which is made now if need be.

    Those that are stored in bfloat16 are left out. None, with a warning, where the cache does not take the copy.
    """
    stored: dict[str, Tensor] = {}
    for name in part.linked:
        stored |= safetensors_entries(checkpoint / name)
    chosen = {name: one for name, one in sorted(stored.items()) if one.dtype in WIDE and len(one.shape) > 1}
    if not chosen:
        return {}
    key = Key.of(f"{part.component}_weights", "rounded", {}, part.linked, ANY, "bfloat16", {"layout": LAYOUT})
    entry = find(key) or keep(key, lambda draft: _write(draft / FILE, chosen))
    return None if entry is None else _mapped(part, chosen, entry)


def _write(path: Path, chosen: Mapping[str, Tensor]) -> None:
    """One tensor after another, none of which is in memory with others."""
    maps = {file: np.memmap(file, np.uint8, mode="r") for file in {one.file for one in chosen.values()}}
    with giving_back(list(maps)), path.open("wb") as file:
        for one in chosen.values():
            values = np.frombuffer(maps[one.file][one.begin : one.end].tobytes(), LINKABLE[one.dtype])
            file.write(as_stored(floats(Stored(values, one.dtype), one.file), "BF16").data)


def _mapped(part: Part, chosen: Mapping[str, Tensor], entry: Entry) -> dict[str, Linked]:
    path = entry.folder / FILE
    whole = np.memmap(path, np.uint8, mode="r")
    ends = np.cumsum([(one.end - one.begin) // LINKABLE[one.dtype].itemsize * WIDTH for one in chosen.values()])
    begins = dict(zip(chosen, (0, *map(int, ends)), strict=False))
    found = {}
    for name, constant in part.constants.items():
        if constant.linked and constant.tensor in chosen:
            begin = begins[constant.tensor]
            size = int(np.prod(constant.shape)) * WIDTH
            values = whole[begin : begin + size].view(LINKABLE["BF16"]).reshape(constant.shape)
            found[name] = Linked(values, "BF16", Place(path, whole, begin))
    return found


def multiplied(model: Any) -> frozenset[str]:
    """Names of the model's inputs that operations take as their weight and nothing else takes."""
    return frozenset(port.any_name for port in model.inputs if all(_takes_weight(each) for each in _readers(port)))


def _readers(value: Any) -> Iterator[Any]:
    """Inputs that take a value, perhaps in another type."""
    for port in value.get_target_inputs():
        node = port.get_node()
        if node.get_type_name() == "Convert":
            yield from _readers(node.output(0))
        else:
            yield port


def _takes_weight(port: Any) -> bool:
    return bool(WEIGHTS.get(port.get_node().get_type_name()) == port.get_index())


def multiply_narrow(model: Any) -> None:
    """Have operations take weights in bfloat16 as they are: those that are stored so, and those that are computed.

    A graph widens them to float32, because that is the type of its values.
    """
    from openvino import Type, opset13

    for node in model.get_ordered_ops():
        index = WEIGHTS.get(node.get_type_name())
        if index is None or (narrow := _narrow(node.input_value(index))) is None:
            continue
        result, kind = node.output(0), node.get_output_element_type(0)
        readers, names = result.get_target_inputs(), result.get_names()
        if index:  # what it multiplies them by; others take whole numbers beside them
            node.input(0).replace_source_output(opset13.convert(node.input_value(0), Type.bf16).output(0))
        node.input(index).replace_source_output(narrow)
        wide = opset13.convert(result, kind).output(0)
        result.set_names(set())
        wide.set_names(names)
        for reader in readers:
            reader.replace_source_output(wide)
    model.validate_nodes_and_infer_types()


def _narrow(value: Any) -> Any | None:
    """A weight in bfloat16, or None where it is a constant of another type, or no constant at all."""
    from openvino import Type, opset13

    node = value.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Constant":
        return node.output(0) if node.get_output_element_type(0) == Type.bf16 else None
    computed = value.get_element_type().is_real() and _follows(node)
    return opset13.convert(value, Type.bf16).output(0) if computed else None


def _follows(node: Any) -> bool:
    """Whether a value follows from constants alone."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter":
            return False
        above = [value.get_node() for value in node.input_values()]
        waiting += [each for each in above if each.get_name() not in seen]
        seen |= {each.get_name() for each in above}
    return True
