"""TorchScript archives, written from the traced graph so that every format computes the same operations.

Not by TorchScript's own tracer: it takes sizes that reach an operation in a list for constants.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.exporters.folder import FolderExporter
from anamorph.exporters.formats import Format, for_all_sizes
from anamorph.exporting import Exporter
from anamorph.interface import Interface
from anamorph.plugins import hookimpl

if TYPE_CHECKING:
    import torch

    from anamorph.exporters.storing import Storing, Written

FILE = "model.pt"
PLACES = ("device", "layout", "pin_memory")
"""Arguments that say where a tensor lies: an archive is for the processor."""


def write(program: "torch.export.ExportedProgram", _: Interface, folder: Path, __: "Storing") -> "Written":
    """Write `model.pt`, which holds the weights, too."""
    import torch

    from anamorph.exporters.storing import Written

    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would rather see torch.export
        scripted: Any = torch.jit.script(_plain(program))
        scripted.save(folder / FILE)
    return Written(FILE, {}, {})


def _plain(program: "torch.export.ExportedProgram") -> "torch.fx.GraphModule":
    """The graph with its weights as attributes, and operations as TorchScript knows them: it chooses overloads itself.

    What the trace asserts holds for every input that the interface admits, and is left out.
    """
    import torch

    signature, root, graph = program.graph_signature, torch.nn.Module(), torch.fx.Graph()
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    weights = {name: program.state_dict[key] for name, key in named.items()}
    weights |= {name: program.constants[key] for name, key in signature.inputs_to_lifted_tensor_constants.items()}
    known: dict[Any, Any] = {}
    for node in program.graph.nodes:
        arguments = torch.fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__) if node.users else ((), {})
        if node.op == "placeholder" and node.name in weights:
            root.register_buffer(node.name, weights[node.name].detach())
            known[node] = graph.get_attr(node.name)
        elif node.op == "placeholder":
            known[node] = graph.placeholder(node.name)
        elif node.target is torch.ops.aten.sym_size.int:
            known[node] = graph.call_method("size", arguments[0])
        elif node.op == "call_function" and node.users:
            told = {key: value for key, value in arguments[1].items() if key not in PLACES}
            known[node] = graph.call_function(getattr(node.target, "overloadpacket", node.target), arguments[0], told)
    outputs = [next(node for node in program.graph.nodes if node.name == name) for name in signature.user_outputs]
    graph.output(tuple(known[node] for node in outputs))
    return torch.fx.GraphModule(root, graph)


def unavailable() -> str | None:
    """None, or what is missing."""
    return None if importlib.util.find_spec("torch") else "torch not installed; run: pip install 'anamorph[torch]'"


@hookimpl
def anamorph_exporters() -> list[Exporter]:
    return [FolderExporter(Format("torchscript", ("torch",), for_all_sizes(write), unavailable, images=False))]
