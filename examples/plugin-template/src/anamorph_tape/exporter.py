"""Writes a traced model as a tape: one JSON object per operation, and the weights as safetensors."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph import hookimpl
from anamorph.exporters.folder import FolderExporter
from anamorph.exporters.formats import Format, for_all_sizes
from anamorph.exporting import Exporter
from anamorph.interface import Interface
from anamorph_tape import FORMAT, TAPE, WEIGHTS

if TYPE_CHECKING:
    import torch

    from anamorph.exporters.storing import Storing, Written


def write(program: "torch.export.ExportedProgram", interface: Interface, folder: Path, _: "Storing") -> "Written":
    """Write one part; inputs and outputs of `program` are in the order of `interface`."""
    from safetensors.torch import save_file

    from anamorph.exporters.storing import Written

    folder.mkdir(parents=True, exist_ok=True)
    signature, graph = program.graph_signature, program.graph
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    weights = {node: program.state_dict[name] for node, name in named.items()}
    weights |= {node: program.constants[name] for node, name in constants.items()}
    save_file({name: value.detach().contiguous().clone() for name, value in weights.items()}, folder / WEIGHTS)
    tape: dict[str, Any] = {
        "inputs": dict(zip((port.name for port in interface.inputs), signature.user_inputs, strict=True)),
        "lines": [
            {"to": node.name, "call": called(node.target), "args": plain(node.args), "named": plain(node.kwargs)}
            for node in graph.nodes
            if node.op == "call_function" and node.users
        ],
        "outputs": dict(zip((port.name for port in interface.outputs), signature.user_outputs, strict=True)),
    }
    (folder / TAPE).write_text(json.dumps(tape), encoding="utf-8")
    return Written(TAPE, taps={}, constants={})


def called(target: Any) -> str:
    """`aten.conv2d.default`, or the name of a function on whole numbers such as `mul`."""
    return str(target) if "aten." in str(target) else str(target.__name__)


def plain(value: Any) -> Any:
    """Arguments as JSON: values of the tape and names of PyTorch's constants as objects of one key."""
    import torch

    if isinstance(value, torch.fx.Node):
        return {"value": value.name}
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if name != "device"}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {"torch": str(value).removeprefix("torch.")}
    return value


def unavailable() -> str | None:
    """None, or what is missing and how to install it; asked often, so that it imports nothing heavy."""
    from importlib.util import find_spec

    return None if find_spec("torch") else "PyTorch is not installed; run: pip install 'anamorph[torch]'"


@hookimpl
def anamorph_exporters() -> list[Exporter]:
    return [FolderExporter(Format(FORMAT, ("torch", "anamorph-tape"), for_all_sizes(write), unavailable, images=False))]
