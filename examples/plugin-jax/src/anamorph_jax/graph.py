"""A traced model as one function of JAX: from its weights and inputs to its outputs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array

from anamorph.errors import BackendError
from anamorph.interface import Interface
from anamorph_jax.operators import OPERATORS

if TYPE_CHECKING:
    import torch


def weights_of(program: "torch.export.ExportedProgram") -> dict[str, Array]:
    """All parameters, buffers and constants of a traced model, by the names of the graph's inputs."""
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = {name: program.state_dict[key] for name, key in stored.items()}
    found |= {name: program.constants[key] for name, key in signature.inputs_to_lifted_tensor_constants.items()}
    return {name: jnp.array(value.detach().numpy()) for name, value in found.items()}


class Graph:
    """The operations of a traced model in their order; what it asserts holds for all inputs that were checked."""

    def __init__(self, program: "torch.export.ExportedProgram", interface: Interface) -> None:
        signature = program.graph_signature
        self.inputs, self.outputs = signature.user_inputs, signature.user_outputs
        self.nodes = [node for node in program.graph.nodes if node.op == "call_function" and node.users]
        unknown = {str(node.target) for node in self.nodes} - set(OPERATORS)
        if unknown:
            raise BackendError(
                f"engine jax does not know {', '.join(sorted(unknown))}, which {interface.component} uses; add it to "
                "anamorph_jax/operators.py"
            )

    def __call__(self, weights: Mapping[str, Array], given: Sequence[Array]) -> list[Array]:
        values: dict[str, Any] = {**weights, **dict(zip(self.inputs, given, strict=True))}

        def read(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [read(one) for one in value]
            return values[value.name] if hasattr(value, "op") else value

        for node in self.nodes:
            named = {name: read(value) for name, value in node.kwargs.items()}
            values[node.name] = OPERATORS[str(node.target)](*read(node.args), **named)
        return [values[name] for name in self.outputs]
