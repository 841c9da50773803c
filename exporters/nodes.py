"""What all writers ask about the nodes of a PyTorch graph."""

from collections.abc import Iterator
from typing import Any

import torch


def bound_arguments(node: Any) -> dict[str, Any]:
    """The arguments of an operation by the names of its schema, those that were left out as well."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {f"arg{index}": value for index, value in enumerate(node.args)}
    bound = {}
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        bound[argument.name] = given
    return bound


def leaves(value: Any) -> Iterator[Any]:
    """All values in lists, tuples and dictionaries."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value
