"""Sizes in a traced graph are read from inputs that every call has, because absent ones are of size 1."""

import operator
from typing import Any

import torch

from anamorph.interface import Interface

SIZE = torch.ops.aten.sym_size.int


def from_required(program: torch.export.ExportedProgram, interface: Interface) -> None:
    """Rewrite the graph so that no size is read from an optional input, where it follows from a required one."""
    graph, names = program.graph, program.graph_signature.user_inputs
    optional = {name for name, port in zip(names, interface.inputs, strict=True) if port.optional}
    required = [node for node in graph.nodes if node.op == "placeholder" and node.name in {*names} - optional]
    for node in list(graph.nodes):
        if node.target is SIZE and node.args[0].name in optional:
            source, dimension = node.args
            found = _share(source.meta["val"].shape[dimension], required)
            if found is not None:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_computed(graph, *found))
                graph.erase_node(node)
    program.graph_module.recompile()


def _share(size: Any, required: list[Any]) -> tuple[Any, int, int, int] | None:
    """A required input with one of its dimensions, and the numerator and denominator of `size` over it."""
    if isinstance(size, int):
        return None
    for node in required:
        for index, other in enumerate(node.meta["val"].shape):
            if isinstance(other, int):
                continue
            share = size.node.expr / other.node.expr
            if share.is_Rational:
                return node, index, int(share.p), int(share.q)
    return None


def _computed(graph: Any, node: Any, index: int, numerator: int, denominator: int) -> Any:
    """That size as a node."""
    size = graph.call_function(SIZE, (node, index))
    size.meta["val"] = node.meta["val"].shape[index]
    for function, number in ((operator.mul, numerator), (operator.floordiv, denominator)):
        if number != 1:
            value = function(size.meta["val"], number)
            size = graph.call_function(function, (size, number))
            size.meta["val"] = value
    return size
