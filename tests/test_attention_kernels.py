"""Attention by name on eager: each way computes the same, or says that it does not take these tensors here."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from parity import relative
from torch import Tensor
from torch.nn import functional as F

from anamorph import StableDiffusionPipeline
from anamorph.errors import BackendError, InputError
from anamorph.models.attention import multi_head

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "seed": 0, "height": 16, "width": 16}


def latents(folder: Path, **wishes: Any) -> list[Any]:
    pipe = StableDiffusionPipeline.from_pretrained(folder, backend="eager", **wishes)
    return [np.asarray(state.latents).copy() for state in pipe.steps(**CALL)]


@pytest.mark.parametrize("way", ["sdpa", "flash", "math", "sliced", "plain"])
def test_every_way_computes_the_same(sd2: Path, way: str) -> None:
    expected = latents(sd2)
    found = latents(sd2, backend_options={"attention": way})
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-5
    pipe = StableDiffusionPipeline.from_pretrained(sd2, backend="eager", backend_options={"unet": {"attention": way}})
    assert pipe.placement["unet"].details["attention"] == way
    assert "attention" not in pipe.placement["vae_decoder"].details


@pytest.mark.parametrize("way", ["efficient", "cudnn"])
def test_kernels_that_the_processor_lacks_are_refused(sd2: Path, way: str) -> None:
    with pytest.raises(BackendError, match=f"attention by {way} does not take float32 of .* channels on cpu"):
        latents(sd2, backend_options={"attention": way})


def test_unknown_ways_and_other_engines_refuse(sd2: Path) -> None:
    with pytest.raises(InputError, match="attention is 'quick', expected one of sdpa, plain, flash"):
        latents(sd2, backend_options={"attention": "quick"})
    with pytest.raises(BackendError, match="engine null has no option attention; it has none"):
        StableDiffusionPipeline.from_pretrained(sd2, backend="null", backend_options={"attention": "sdpa"})
    with pytest.raises(BackendError, match="xformers cannot be imported"):
        latents(sd2, backend_options={"attention": "xformers"})


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_xformers_gets_heads_after_tokens(monkeypatch: pytest.MonkeyPatch, causal: bool, masked: bool) -> None:
    """Its documented contract, q, k and v [B, S, heads, d] and an additive bias [B, heads, S, T], written out."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None) -> Tensor:
        assert q.shape == (2, 5, 4, 8)
        scores = torch.einsum("bshd,bthd->bhst", q, k) / 8**0.5
        weights = (scores if attn_bias is None else scores + attn_bias).softmax(-1)
        return torch.einsum("bhst,bthd->bshd", weights, v)

    monkeypatch.setitem(
        sys.modules, "xformers", SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attention))
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 32) for _ in range(3))
    bias = torch.randn(2, 1, 1, 5) if masked else None
    found = multi_head(q, k, v, 4, causal=causal, bias=bias, fused="xformers")
    heads = [x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads, attn_mask=bias, is_causal=causal).transpose(1, 2).flatten(2)
    assert torch.allclose(found, expected, atol=1e-6)
