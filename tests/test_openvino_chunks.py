"""Attention by chunks of keys: the values of attention at once, and where it stays as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from openvino import opset13 as op
from parity import relative

from anamorph import DiffusionPipeline
from anamorph.backends import openvino_chunks
from anamorph.backends.openvino import OpenVino
from anamorph.backends.openvino_chunks import MANY, chunk_keys
from anamorph.image import psnr

KEYS = MANY + 392  # three chunks


def graph(
    keys: int, dynamic: bool = False, masked: bool = False, causal: bool = False, scale: float | None = None
) -> Any:
    """Attention of two samples, two heads and 8 numbers a head, of 16 queries or as many as keys."""
    queries = keys if causal else 16
    shapes = [(2, 2, -1 if dynamic else count, 8) for count in (queries, keys, keys)]
    given = [op.parameter(shape, openvino.Type.f32, name=name) for name, shape in zip("qkv", shapes, strict=True)]
    mask = op.constant(np.zeros((1, 1, queries, keys), np.float32)) if masked else None
    if scale is not None:  # as converters write it
        further = [op.constant(np.float32(0)), op.constant(np.float32(scale))]
        return openvino.Model([op.result(op.scaled_dot_product_attention(*given, *further))], given, "attention")
    attended = op.scaled_dot_product_attention(*given, mask, causal=causal)
    return openvino.Model([op.result(attended)], given, "attention")


def inputs(scale: float, seed: int = 0) -> list[NDArray[np.float32]]:
    """Queries, keys and values; scores grow with the scale's square."""
    chance = np.random.default_rng(seed)
    drawn = [chance.standard_normal((2, 2, count, 8), np.float32) for count in (16, KEYS, KEYS)]
    return [np.float32(scale) * drawn[0], np.float32(scale) * drawn[1] + 3, drawn[2]]


def expected(queries: Any, keys: Any, values: Any) -> NDArray[Any]:
    """Attention in float64."""
    q, k, v = (np.asarray(value, np.float64) for value in (queries, keys, values))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(shares @ v / shares.sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def chunked() -> Any:
    """Compiled in float32."""
    model = graph(KEYS)
    assert chunk_keys(model) == 1
    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@settings(max_examples=20)
@given(scale=st.floats(0.0, 12.0), seed=st.integers(0, 2**32 - 1))
def test_it_is_attention_for_scores_of_any_size(chunked: Any, scale: float, seed: int) -> None:
    """From equal scores to those where one key takes all, which are attended to at once."""
    values = inputs(scale, seed)
    # A score that is computed in float32 is off by the rounding of its own size, and shares by as much.
    largest = np.abs(values[0]).max() * np.abs(values[1]).max() * 8**0.5
    assert relative(chunked(values)[0], expected(*values)) <= 1e-5 + 2.0**-23 * largest


def test_a_scale_of_its_own_counts() -> None:
    model = graph(KEYS, scale=0.1)
    assert chunk_keys(model) == 1
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    queries, keys, values = inputs(2.0)
    assert relative(compiled([queries, keys, values])[0], expected(0.1 * 8**0.5 * queries, keys, values)) <= 1e-5


def test_chunks_alone_give_what_they_shall(chunked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all chunks must serve, however far the scores are from one another; and never where none may."""
    values = inputs(2.0)
    for far in (np.inf, 0.0):
        monkeypatch.setattr(openvino_chunks, "FAR", far)
        model = graph(KEYS)
        chunk_keys(model)
        forced = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert relative(forced(values)[0], expected(*values)) <= 1e-5
    monkeypatch.setattr(openvino_chunks, "FAR", np.inf)
    model = graph(KEYS)
    chunk_keys(model)
    beyond = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    wild = inputs(60.0)
    assert not np.isfinite(beyond(wild)[0]).all()  # what the condition is for
    assert relative(chunked(wild)[0], expected(*wild)) <= 1e-3


@pytest.mark.parametrize(
    ("keys", "how"),
    [(MANY, {}), (KEYS, {"dynamic": True}), (KEYS, {"masked": True}), (KEYS, {"causal": True})],
    ids=["few", "dynamic", "masked", "causal"],
)
def test_other_attention_stays(keys: int, how: dict[str, bool]) -> None:
    model = graph(keys, **how)
    assert chunk_keys(model) == 0
    assert "If" not in {node.get_type_name() for node in model.get_ordered_ops()}


@pytest.mark.skipif("bfloat16" not in OpenVino().precisions("cpu"), reason="the processor has no bfloat16 for OpenVINO")
def test_pictures_of_many_pixels(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By chunks, in full, from the cache, and by eager in float32: as near as bfloat16 is, and the switch counts."""
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path / "cache"))
    counts: list[int] = []

    def counted(model: Any) -> int:
        counts.append(chunk_keys(model))
        return counts[-1]

    monkeypatch.setattr("anamorph.backends.openvino_models.chunk_keys", counted)

    def drawn(**opening: Any) -> NDArray[Any]:
        pipe: Any = DiffusionPipeline.from_pretrained(sd1, **opening)
        side = 72 * pipe.vae_scale_factor
        picture = pipe("a cat", height=side, width=side, num_inference_steps=2, seed=0, output_type="np").images
        return np.asarray(picture)

    asked = {"backend": "openvino", "torch_dtype": "bfloat16"}
    chunked = drawn(**asked, rewrites="key-chunks")
    assert sum(counts) >= 2  # in the UNet and in the decoder
    made = list(counts)
    np.testing.assert_array_equal(drawn(**asked, rewrites="key-chunks"), chunked)
    assert counts == made  # found in the cache
    plain = drawn(**asked, rewrites="none")
    assert counts == made
    exact = drawn(backend="eager", torch_dtype="float32", rewrites="none")
    assert psnr(chunked, exact) > psnr(plain, exact) - 2
    assert psnr(chunked, exact) > 35
