"""What PyTorch eager computes in a call: the operations of products, and the exponentials of softmax.

Beside more pixels, attention's scores grow with their square, and each takes one exponential. That is no product of
matrices, so that a count of products alone promises more of large pictures than a processor can keep.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Operations:
    """`flops`: two for each multiplication and addition; `exponentials`: one for each score of attention."""

    flops: int = 0
    exponentials: int = 0


@contextmanager
def counted() -> Iterator[Operations]:
    """Count what PyTorch computes inside the context; the counts are complete at its end."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    found, aten = Operations(), torch.ops.aten
    mapping: dict[Any, Callable[..., int]] = {
        # PyTorch itself counts only kernels of GPUs, and no softmax.
        aten._scaled_dot_product_flash_attention_for_cpu: _attention(found),
        aten._softmax: _softmax(found),
        aten._safe_softmax: _softmax(found),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        yield found
    found.flops = counter.get_total_flops()


def _attention(found: Operations) -> Callable[..., int]:
    def count(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
        """Both products of attention over tensors of these shapes [batch, heads, tokens, width]."""
        batch, heads, tokens, width = query
        scores = batch * heads * tokens * key[2]
        found.exponentials += scores
        return 2 * scores * (width + value[3])

    return count


def _softmax(found: Operations) -> Callable[..., int]:
    def count(scores: Sequence[int], *_: Any, **__: Any) -> int:
        found.exponentials += math.prod(scores)
        return 0

    return count
