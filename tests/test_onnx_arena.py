"""The arena that ONNX Runtime's sessions share: it holds no sum of peaks, and gives back what nobody holds."""

import gc
import resource
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from anamorph.backends import onnx_models
from anamorph.backends.buckets import COMPILED
from anamorph.backends.onnx_arena import IDLE, SHARED
from anamorph.backends.onnx_providers import Choice
from anamorph.engine import Target

WIDE = 64 << 20
SIZE = 4 * WIDE
"""Elements of float32, and their bytes."""


def opened(path: Path, choice: Choice | None = None) -> onnx_models.Model:
    """A model that makes a value of 256 MiB on its way and returns one number, in a session as the engine opens it."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    nodes = [
        helper.make_node("Expand", ["x", "size"], ["wide"]),
        helper.make_node("Sqrt", ["wide"], ["rooted"]),
        helper.make_node("ReduceMax", ["rooted"], ["y"], keepdims=1),
    ]
    size = helper.make_tensor("size", TensorProto.INT64, [1], [WIDE])
    graph = helper.make_graph(nodes, "wide", [x], [y], [size])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    options = onnx_models._options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnx_models._session(str(path), path.parent, {}, options, choice)
    return onnx_models.Model(session, COMPILED, str(path), path.parent, {})


def called(model: onnx_models.Model) -> None:
    """Call it once."""
    assert model.engine.run(None, {"x": np.array([4], np.float32)})[0] == 2


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_sessions_share_what_they_need_one_after_another(tmp_path: Path) -> None:
    gc.collect()
    one, two = (opened(tmp_path / f"{name}.onnx") for name in ("one", "two"))
    before = resident()
    called(one)
    first = resident() - before
    assert first > SIZE  # the arena keeps what a call has taken
    called(two)
    assert resident() - before < first + SIZE / 2
    del one, two
    assert resident() - before < SIZE / 2


def test_an_arena_that_is_asked_for_is_not_replaced(tmp_path: Path) -> None:
    plain = opened(tmp_path / "plain.onnx", Choice.of(Target()))
    asked = Choice.of(Target(options=(("provider.arena_extend_strategy", "kSameAsRequested"),)))
    own = opened(tmp_path / "own.onnx", asked)
    assert plain.engine.get_session_options().get_session_config_entry(SHARED[0]) == "1"
    with pytest.raises(RuntimeError, match=SHARED[0]):
        own.engine.get_session_options().get_session_config_entry(SHARED[0])


def test_the_graph_that_shrinks_it_copies_a_number() -> None:
    model = onnx.load_from_string(IDLE)
    onnx.checker.check_model(model, full_check=True)
    assert [(node.op_type, node.input, node.output) for node in model.graph.node] == [("Identity", ["x"], ["y"])]
