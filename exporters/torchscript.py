"""TorchScript archives, traced from the exported graph so that every format computes the same operations."""

import importlib.util
import operator
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anamorph.exporters.folder import FolderExporter, Format
from anamorph.exporting import Exporter
from anamorph.interface import Interface
from anamorph.plugins import hookimpl
from anamorph.probes import probe, probe_sizes

if TYPE_CHECKING:
    import torch

    from anamorph.exporters.storing import Storing, Written

FILE = "model.pt"


def write(program: "torch.export.ExportedProgram", interface: Interface, folder: Path, _: "Storing") -> "Written":
    """Write `model.pt`, which holds the weights, too."""
    import torch

    from anamorph.exporters.storing import Written

    folder.mkdir(parents=True, exist_ok=True)
    values = [torch.from_numpy(value) for value in probe(interface, probe_sizes(interface)[-1]).values()]
    module = _recordable(program)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # its deprecation, and the types of numbers that the graph asserts
        traced: Any = torch.jit.trace(module, tuple(values), check_trace=False)  # type: ignore[no-untyped-call]
    traced.save(folder / FILE)
    return Written(FILE, {}, {})


def _recordable(program: "torch.export.ExportedProgram") -> "torch.nn.Module":
    """The graph as a module whose sizes a tracer follows: read by a tensor's method instead of an operation."""
    import torch

    for name in program.graph_signature.parameters:  # an exported program may hold them as plain tensors
        program.state_dict[name] = torch.nn.Parameter(program.state_dict[name].detach(), requires_grad=False)
    module = program.module(check_guards=False)
    graph: Any = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and not node.users and node.target is not operator.setitem:
            graph.erase_node(node)  # what the trace asserts holds for every input that the interface admits
        elif node.target is torch.ops.aten.sym_size.int:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_method("size", node.args))
            graph.erase_node(node)
    module.recompile()
    return module


def unavailable() -> str | None:
    """None, or what is missing."""
    return None if importlib.util.find_spec("torch") else "torch not installed; run: pip install 'anamorph[torch]'"


@hookimpl
def anamorph_exporters() -> list[Exporter]:
    return [FolderExporter(Format("torchscript", ("torch",), write, unavailable))]
