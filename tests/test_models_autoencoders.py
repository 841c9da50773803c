"""Autoencoders other than the plain one, and pictures in tiles and slices, compared with diffusers."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from checkpoints import VAE
from model_parity import TOLERANCE, error, normal, pair

from anamorph.errors import ConfigError
from anamorph.models import MODELS, AutoencoderKL, AutoencoderTiny, VQModel
from anamorph.tiling import plans, tiled

TINY: dict[str, Any] = {
    "encoder_block_out_channels": (16, 16, 16),
    "decoder_block_out_channels": (16, 16, 16),
    "num_encoder_blocks": (1, 2, 1),
    "num_decoder_blocks": (2, 1, 1),
}
VQ: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
    "num_vq_embeddings": 24,
}


@pytest.mark.parametrize("config", [{}, {"act_fn": "silu", "latent_channels": 16, "out_channels": 4}], ids=str)
def test_tiny_equals_diffusers(config: dict[str, Any]) -> None:
    ours, theirs = pair("AutoencoderTiny", {**TINY, **config})
    pictures, latents = normal(2, 3, 16, 24), 2 * normal(2, ours.config.latent_channels, 4, 6)
    with torch.no_grad():
        assert error(ours.encode(pictures).latents, theirs.encode(pictures).latents) <= TOLERANCE
        assert error(ours.decode(latents).sample, theirs.decode(latents).sample) <= TOLERANCE
        assert error(ours.decode(1.001 * latents).sample, ours.decode(latents).sample) > 3 * TOLERANCE
        assert torch.equal(ours.encode(pictures, False)[0], ours.encode(pictures).latents)
        assert torch.equal(ours.decode(latents, False)[0], ours.decode(latents).sample)
        assert torch.equal(ours.scale_latents(latents), theirs.scale_latents(latents))
        assert torch.equal(ours.unscale_latents(latents), theirs.unscale_latents(latents))
        # A shade more or less, where both round differently, is seen but small.
        assert error(ours(pictures).sample, theirs(pictures).sample) <= 1e-2


@pytest.mark.parametrize("config", [{}, {"vq_embed_dim": 5, "mid_block_add_attention": False}], ids=str)
def test_vq_equals_diffusers(config: dict[str, Any]) -> None:
    ours, theirs = pair("VQModel", {**VQ, **config})
    pictures, latents = normal(2, 3, 16, 24), normal(2, ours.config.vq_embed_dim or 3, 8, 12)
    with torch.no_grad():
        assert error(ours.encode(pictures).latents, theirs.encode(pictures).latents) <= TOLERANCE
        assert error(ours.decode(latents).sample, theirs.decode(latents).sample) <= TOLERANCE
        plain = ours.decode(latents, force_not_quantize=True).sample
        assert error(plain, theirs.decode(latents, force_not_quantize=True).sample) <= TOLERANCE
        assert error(plain, ours.decode(latents).sample) > 1e-2
        assert error(ours(pictures).sample, theirs(pictures).sample) <= TOLERANCE


def test_quantised_latents_are_entries_of_the_codebook() -> None:
    ours, _ = pair("VQModel", VQ)
    entries = ours.quantize.embedding.weight
    with torch.no_grad():
        exact = entries[torch.arange(24).reshape(2, 3, 4)].permute(0, 3, 1, 2)
        assert torch.equal(ours.quantize(exact + 1e-3), exact)


@pytest.mark.parametrize(("name", "config"), [("AutoencoderTiny", TINY), ("VQModel", VQ)], ids=["tiny", "vq"])
def test_loads_what_diffusers_saved_and_back(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    _, theirs = pair(name, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MODELS[name].from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
    pictures = normal(1, 3, 16, 16)
    with torch.no_grad():
        expected = theirs.encode(pictures).latents
        assert error(ours.encode(pictures)[0], expected) <= TOLERANCE
        assert torch.equal(again.encode(pictures).latents, expected)


TILED: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "even": ({}, (40, 32)),
    "one row": ({}, (16, 41)),
    "wide": ({}, (12, 70)),
    "small tiles": ({"sample_size": 8}, (30, 22)),
    "whole": ({}, (16, 16)),
}


@pytest.mark.parametrize("case", TILED)
def test_tiles_equal_those_of_diffusers(case: str) -> None:
    changes, (height, width) = TILED[case]
    ours, theirs = pair("AutoencoderKL", {**VAE, **changes})
    pictures, latents = normal(2, 3, height, width), normal(2, 4, height // 2, width // 2)
    with torch.no_grad():
        whole = ours.encode(pictures).latent_dist.parameters, ours.decode(latents).sample
        ours.enable_tiling()
        theirs.enable_tiling()
        moments = ours.encode(pictures).latent_dist.parameters
        assert error(moments, theirs.encode(pictures).latent_dist.parameters) <= TOLERANCE
        decoded = ours.decode(latents).sample
        assert error(decoded, theirs.decode(latents).sample) <= TOLERANCE
        if case != "whole":
            assert error(decoded, whole[1]) > 1e-3
            assert error(moments, whole[0]) > 1e-3
        ours.disable_tiling()
        assert torch.equal(ours.decode(latents).sample, whole[1])


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_slices_are_the_pictures_one_by_one(name: str) -> None:
    ours, _ = pair(name, VAE if name == "AutoencoderKL" else TINY)
    sizes: list[int] = []
    ours.decoder.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    latents = normal(3, 4, 8, 8)
    with torch.no_grad():
        expected = ours.decode(latents).sample
        ours.enable_slicing()
        assert error(ours.decode(latents).sample, expected) <= TOLERANCE
        ours.disable_slicing()
        ours.decode(latents)
    assert sizes == [3, 1, 1, 1, 3]


def test_tiles_of_the_tiny_autoencoder_show_no_seams() -> None:
    """Its decoder sees nine latents far, less than tiles overlap: away from seams tiles are the whole picture."""
    ours, _ = pair("AutoencoderTiny", TINY)
    ours.SIDE = 128
    latents = normal(1, 4, 40, 48)
    with torch.no_grad():
        whole = ours.decode(latents).sample
        ours.enable_tiling()
        parts = ours.decode(latents).sample
    assert error(parts, whole) < 0.5
    assert error(parts[..., :64, :64], whole[..., :64, :64]) <= TOLERANCE


def test_tiles_of_what_sees_single_pixels_are_the_whole() -> None:
    pictures = np.random.default_rng(0).standard_normal((2, 3, 70, 50)).astype(np.float32)
    encode, decode = plans(32, 8, 0.25)
    halves = tiled(lambda tile: tile[:, :, ::4, ::4], pictures, encode)
    assert np.allclose(halves, pictures[:, :, ::4, ::4], atol=1e-6)
    grown = tiled(lambda tile: tile.repeat(4, axis=2).repeat(4, axis=3), halves, decode)
    assert np.allclose(grown, halves.repeat(4, axis=2).repeat(4, axis=3), atol=1e-6)


def test_seams_fade() -> None:
    """Tiles that differ by a constant meet in a straight ramp."""
    brightness = iter((0.0, 1.0, 1.0))
    _, decode = plans(16, 16, 0.25)
    faded = tiled(lambda tile: tile * 0 + next(brightness), np.zeros((1, 1, 12, 28), np.float32), decode)
    assert np.allclose(faded[0, 0, 3], [0] * 12 + [0, 0.25, 0.5, 0.75] + [1] * 12)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("AutoencoderTiny", {"num_decoder_blocks": (1, 2)}, "one per entry of num_decoder_blocks"),
    ("AutoencoderTiny", {"encoder_block_out_channels": (16, 16, 32)}, "encoder_block_out_channels of one width"),
    ("AutoencoderTiny", {"upsample_fn": "bilinear"}, "upsample_fn='bilinear'"),
    ("VQModel", {"norm_type": "spatial"}, "norm_type='spatial'"),
    ("VQModel", {"lookup_from_codebook": True}, "lookup_from_codebook=True"),
    ("VQModel", {"up_block_types": ("AttnUpDecoderBlock2D",) * 2}, "2 times UpDecoderBlock2D"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_configurations_that_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MODELS[name](**{**(TINY if name == "AutoencoderTiny" else VQ), **change})


@pytest.mark.parametrize("model", [AutoencoderTiny, VQModel, AutoencoderKL])
def test_configuration_keys_and_defaults_are_those_of_diffusers(model: type[Any]) -> None:
    parameters = inspect.signature(getattr(diffusers, model.__name__).__init__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    assert dict(model.DEFAULTS) == defaults
