"""Attention to many pixels by chunks of keys: the rewrite "key-chunks".

OpenVINO multiplies a few rows of queries by all keys, and holds their scores until the softmax is done. Scores of many
keys do not fit into a core's cache, and in bfloat16 attention then takes twice as long as its operations need. Here
each chunk of keys has a softmax of its own, and the sums of all chunks are joined: over scores s_j and values v_j,
sum_j exp(s_j) v_j and sum_j exp(s_j) are sums over chunks, whose quotient is attention.

A softmax does not tell the sum that it divides by. Each chunk therefore sees one more key, of known score t, and values
of two more columns: 1 for its own keys and 0 for the known one, and the other way round. What comes out is divided by
the last column, exp(t) / (exp(t) + sum_j exp(s_j)); that leaves exp(-t) times the sums, which cancels in the quotient.

Keys are centred first, which changes no softmax: the largest score of a row then lies between 0 and
2 t = |q| max_j |k_j| / sqrt(d), at most t away from t. Where t reaches FAR in some row, the graph attends to all keys
at once instead, because the last column might leave the range of floats.
"""

from itertools import pairwise
from typing import Any

import numpy as np

CHUNK = 2304
"""Keys of a chunk at most: as fast as smaller ones where a core has 1 MiB of cache, with 40 to 512 numbers a key."""
FAR = 60.0
"""exp(-60) / 16384 keys is 5e-31, and the least normal number of float32 and bfloat16 is 1e-38."""
MANY = 2 * CHUNK
"""Keys up to which all at once are as fast."""
Value = Any
"""An output of OpenVINO's graph."""


def chunk_keys(model: Any) -> int:
    """Let attentions [batch, heads, tokens, width] to more keys than MANY go by chunks; returns how many there were.

    Those with a mask or of unknown sizes stay.
    """
    found = [node for node in model.get_ordered_ops() if _long(node)]
    for node in found:
        chosen = _chosen(*(port.get_source_output() for port in node.inputs()))
        chosen.get_node().set_friendly_name(node.get_friendly_name())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(chosen)
    model.validate_nodes_and_infer_types()
    return len(found)


def _long(node: Any) -> bool:
    if node.get_type_name() != "ScaledDotProductAttention" or node.get_attributes()["causal"]:
        return False
    shapes = [port.get_partial_shape() for port in node.inputs()[:3]]
    known = all(shape.is_static and len(shape) == 4 for shape in shapes)
    return known and not _masked(node) and shapes[1][2].get_length() > MANY


def _masked(node: Any) -> bool:
    """Whether its mask is any but the number 0, which stands where only a scale is given."""
    mask = [port.get_source_output().get_node() for port in node.inputs()[3:4]]
    return any(each.get_type_name() != "Constant" or each.data.size != 1 or each.data.item() != 0 for each in mask)


def _chosen(queries: Value, keys: Value, values: Value, _: Value = None, scale: Value = None) -> Value:
    """Attention by chunks where all scores are near enough, else at once."""
    from openvino import Model
    from openvino import opset13 as op

    scaled = op.multiply(queries, _number(queries.get_shape()[3] ** -0.5) if scale is None else scale)
    centred = op.subtract(keys, op.reduce_mean(keys, _numbers(2), keep_dims=True))
    longest = op.reduce_max(op.reduce_l2(centred, _numbers(3), keep_dims=True), _numbers(2), keep_dims=True)
    known = op.multiply(op.multiply(op.reduce_l2(scaled, _numbers(3), keep_dims=True), longest), _number(0.5))
    near = op.less(op.reduce_max(known, _numbers(0, 1, 2, 3), keep_dims=False), _number(FAR))
    given = [scaled.output(0), centred.output(0), values, known.output(0)]
    chunks, once = ([op.parameter(one.get_shape(), one.get_element_type()) for one in given] for _ in range(2))
    joined = op.result(_joined(*(one.output(0) for one in chunks)))
    plain = op.result(_attention(*(one.output(0) for one in once[:3])))
    choice = op.if_op(near.output(0))
    choice.set_then_body(Model([joined], chunks, "by_chunks"))
    choice.set_else_body(Model([plain], once[:3], "at_once"))
    for one, here, there in zip(given, chunks, (*once[:3], None), strict=True):
        choice.set_input(one, here, there)
    return choice.set_output(joined, plain)


def _attention(queries: Value, keys: Value, values: Value) -> Value:
    """Of queries that are scaled already."""
    from openvino import opset13 as op

    scores = op.matmul(queries, keys, transpose_a=False, transpose_b=True)
    return op.matmul(op.softmax(scores, -1), values, transpose_a=False, transpose_b=False).output(0)


def _joined(queries: Value, keys: Value, values: Value, known: Value) -> Value:
    """The sums of all chunks, divided."""
    from openvino import opset13 as op

    tokens = keys.get_shape()[2]
    queries = op.concat([queries, known], 3).output(0)
    keys, values = _widened(keys, 0.0), _widened(_widened(values, 1.0), 0.0)
    further_key, further_value = _unit(keys), _unit(values)
    total = None
    bounds = np.linspace(0, tokens, -(-tokens // CHUNK) + 1).astype(int)
    for start, end in pairwise(bounds):
        seen = op.concat([further_key, _cut(keys, start, end, 2)], 2).output(0)
        told = op.concat([further_value, _cut(values, start, end, 2)], 2).output(0)
        sums = _over_last(_attention(queries, seen, told))
        total = sums if total is None else op.add(total, sums).output(0)
    return _over_last(total)


def _over_last(value: Value) -> Value:
    """All columns but the last, divided by it."""
    from openvino import opset13 as op

    last = value.get_shape()[3] - 1
    return op.divide(_cut(value, 0, last, 3), _cut(value, last, last + 1, 3)).output(0)


def _widened(value: Value, column: float) -> Value:
    """With one more column of one number."""
    from openvino import opset13 as op

    return op.pad(value, np.zeros(4, np.int64), np.array([0, 0, 0, 1]), "constant", _number(column)).output(0)


def _unit(value: Value) -> Value:
    """One more token for it: 1 in the last column, else 0."""
    from openvino import opset13 as op

    batch, heads, _, width = value.get_shape()
    unit = np.zeros((batch, heads, 1, width), np.float32)
    unit[..., -1] = 1
    return op.constant(unit).output(0)


def _cut(value: Value, start: int, end: int, axis: int) -> Value:
    from openvino import opset13 as op

    return op.slice(value, _numbers(start), _numbers(end), _numbers(1), _numbers(axis)).output(0)


def _numbers(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def _number(value: float) -> Any:
    from openvino import opset13 as op

    return op.constant(np.float32(value))
