"""The memory that ONNX Runtime's sessions on the processor share.

Left alone, each session keeps an arena of its own, which grows by powers of two and holds the most that it ever held:
a pipeline's parts, which run one after another, would hold the sum of their peaks.
"""

from functools import cache, partial
from threading import RLock
from typing import Any

import numpy as np

from anamorph.backends.numpy_program import imported

AS_REQUESTED = 1
"""The strategy by which an arena grows by what is asked for (arena_extend_strategy, onnxruntime.ai)."""
SHARED = ("session.use_env_allocators", "1")
IDLE = bytes.fromhex(
    "08083a3a0a100a017812017922084964656e74697479120469646c655a0f0a017812"
    "0a0a08080112040a020801620f0a0179120a0a08080112040a02080142040a001011"
)
"""The graph y = Identity(x) of one number (IR 8, opset 17), as a file: no package that writes graphs is needed."""
ONCE = RLock()
"""Parts are opened at the same time, and a second arena would take the first one's place for later sessions. A model
may be dropped while its thread holds this."""
SHRINK = ("memory.enable_memory_arena_shrinkage", "cpu:0")


@cache
def _idle() -> Any:
    """Make the arena of this process, and a call that does next to nothing: whatever runs in an arena can shrink it.

    Its values lie outside of the arena, of which they would hold a region while that shrinks.
    """
    engine = imported("onnxruntime", "onnx")
    memory = engine.OrtMemoryInfo("Cpu", engine.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, engine.OrtMemType.DEFAULT)
    engine.create_and_register_allocator(memory, engine.OrtArenaCfg({"arena_extend_strategy": AS_REQUESTED}))
    options = engine.SessionOptions()
    options.add_session_config_entry(*SHARED)
    session = engine.InferenceSession(IDLE, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for bind, name in ((binding.bind_ortvalue_input, "x"), (binding.bind_ortvalue_output, "y")):
        bind(name, engine.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32)))
    how = engine.RunOptions()
    how.add_run_config_entry(*SHRINK)
    return partial(session.run_with_iobinding, binding, how)


def share(options: Any) -> None:
    """Have the session of these options take its memory from the shared arena.

    Without a plan of all values of a call in one piece: the second call would take that beside what the first one took.
    """
    with ONCE:
        _idle()
    options.add_session_config_entry(*SHARED)
    options.enable_mem_pattern = False


def shrink() -> None:
    """Give the system back what no session holds of the shared arena."""
    with ONCE:
        _idle()()
