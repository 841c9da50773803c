"""Denoisers without texts, by noise level, time or class, compared with diffusers on the same weights."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from model_parity import TOLERANCE, error, normal, pair
from safetensors.torch import load_file, save_file

from anamorph.errors import ConfigError, InputError
from anamorph.models import MODELS, DiTTransformer2DModel, UNet2DModel

UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}
SKIP: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": None,
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 1.41421356,
    "norm_eps": 1e-6,
}
LABELS = {"class_labels": torch.tensor([3, 19])}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddpm": ({"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}, {}),
    "two layers": ({"layers_per_block": 2, "attention_head_dim": None, "act_fn": "gelu"}, {}),
    "scaled middle": ({"mid_block_scale_factor": 2.0, "center_input_sample": True}, {}),
    "no attention in the middle": ({"add_attention": False, "attn_norm_num_groups": 4}, {}),
    "other groups in the middle": ({"attn_norm_num_groups": 4}, {}),
    "no middle": ({"mid_block_type": None}, {}),
    "scale and shift": ({"resnet_time_scale_shift": "scale_shift"}, {}),
    "residual changes": ({"downsample_type": "resnet", "upsample_type": "resnet"}, {}),
    "residual blocks": (
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
        },
        {},
    ),
    "learned steps": ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, {}),
    "fourier": ({"time_embedding_type": "fourier"}, {}),
    "classes": ({"num_class_embeds": 20}, LABELS),
    "timestep classes": ({"class_embed_type": "timestep"}, LABELS),
    "ready classes": ({"class_embed_type": "identity"}, {"class_labels": normal(2, 128, seed=3)}),
    "latents": ({"in_channels": 6, "out_channels": 3, "time_embedding_dim": 48}, {}),
    "ncsnpp": (SKIP, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_unet_equals_diffusers(variant: str) -> None:
    config, conditions = VARIANTS[variant]
    ours, theirs = pair("UNet2DModel", {**UNET, **config})
    sample = normal(2, ours.config.in_channels, 24, 16)
    with torch.no_grad():
        for timestep in (torch.tensor([7, 811]), 17):
            expected = theirs(sample, timestep, **conditions).sample
            assert error(ours(sample, timestep, **conditions).sample, expected) <= TOLERANCE
        later = ours(sample, torch.tensor([8, 811]), **conditions).sample
        assert error(later, ours(sample, torch.tensor([7, 811]), **conditions).sample) > 3 * TOLERANCE


def test_unet_knows_classes() -> None:
    ours, _ = pair("UNet2DModel", {**UNET, "num_class_embeds": 20})
    sample = normal(2, 3, 8, 8)
    with torch.no_grad():
        first, second = (ours(sample, 5, torch.tensor(labels)).sample for labels in ([1, 2], [1, 3]))
    assert torch.equal(first[0], second[0])
    assert error(first[1], second[1]) > 1e-3
    with pytest.raises(InputError, match="needs class_labels"):
        ours(sample, 5)
    with pytest.raises(InputError, match="takes no class_labels"):
        UNet2DModel(**UNET)(sample, 5, torch.tensor([1, 2]))


def test_unet_takes_odd_sizes_where_it_can() -> None:
    ours, theirs = pair("UNet2DModel", {**UNET, "up_block_types": ("UpBlock2D", "UpBlock2D")})
    del theirs  # diffusers' does not
    with torch.no_grad():
        assert ours(normal(1, 3, 9, 7), 5).sample.shape == (1, 3, 9, 7)
    skipping = UNet2DModel(**{**UNET, **SKIP}).eval()
    with pytest.raises(InputError, match="multiples of 4"):
        skipping(normal(1, 3, 10, 8), 5)


@pytest.mark.parametrize("variant", ["ddpm", "ncsnpp", "classes"])
def test_unet_loads_what_diffusers_saved_and_back(variant: str, tmp_path: Path) -> None:
    config, conditions = VARIANTS[variant]
    _, theirs = pair("UNet2DModel", {**UNET, **config})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet2DModel.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")
    sample = normal(2, 3, 8, 8)
    with torch.no_grad():
        expected = theirs(sample, 7, **conditions).sample
        assert error(ours(sample, 7, **conditions).sample, expected) <= TOLERANCE
        assert torch.equal(again(sample, 7, **conditions).sample, expected)


def test_unet_reads_the_old_names_of_its_attention(tmp_path: Path) -> None:
    _, theirs = pair("UNet2DModel", UNET)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert sum(".proj_attn.weight" in key for key in state) == 4
    save_file(state, file)
    sample = normal(2, 3, 8, 8)
    with torch.no_grad():
        ours = UNet2DModel.from_pretrained(tmp_path)(sample, 7).sample
        assert error(ours, theirs(sample, 7).sample) <= TOLERANCE


DIT: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 20,
    "out_channels": 8,
}
DITS: dict[str, tuple[dict[str, Any], int]] = {
    "dit": ({}, 8),
    "larger patches": ({"patch_size": 4, "out_channels": None, "in_channels": 3}, 8),
    "other activations": ({"activation_fn": "gelu", "norm_elementwise_affine": True, "attention_bias": False}, 8),
    "gated": ({"activation_fn": "geglu", "norm_eps": 1e-3}, 8),
    "another size": ({}, 12),
}


@pytest.mark.parametrize("variant", DITS)
def test_dit_equals_diffusers(variant: str) -> None:
    config, side = DITS[variant]
    ours, theirs = pair("DiTTransformer2DModel", {**DIT, **config})
    sample, labels = normal(2, ours.config.in_channels, side, side), torch.tensor([4, 20])
    with torch.no_grad():
        expected = theirs(sample, torch.tensor([7, 811]), labels).sample
        assert error(ours(sample, torch.tensor([7, 811]), labels).sample, expected) <= TOLERANCE
        assert error(ours(sample, torch.tensor([7, 812]), labels).sample, expected) > 3 * TOLERANCE
        assert error(ours(sample, torch.tensor([7, 811]), torch.tensor([4, 19])).sample, expected) > 1e-3
        assert torch.equal(ours(sample, 7, labels, return_dict=False)[0], ours(sample, 7.0, labels).sample)


def test_dit_keeps_rows_and_columns_apart() -> None:
    ours, _ = pair("DiTTransformer2DModel", DIT)
    sample, labels = normal(1, 4, 8, 12), torch.tensor([4])
    with torch.no_grad():
        wide = ours(sample, 7, labels).sample
        assert wide.shape == (1, 8, 8, 12)
        # Tokens that see each other alone are seen alike: only positions tell a patch from another.
        assert error(ours(sample.roll(2, dims=3), 7, labels).sample.roll(-2, dims=3), wide) > 1e-3
    with pytest.raises(InputError, match="multiples of patch_size=2"):
        ours(normal(1, 4, 8, 7), 7, labels)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_dit_loads_either_name(name: str, tmp_path: Path) -> None:
    """`Transformer2DModel` is what DiT's published files call it."""
    config = {**DIT, "norm_type": "ada_norm_zero", "patch_size": 2, "activation_fn": "gelu-approximate"}
    config |= {"attention_bias": True, "norm_elementwise_affine": False, "in_channels": 4}
    theirs = getattr(diffusers, name)(**config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MODELS[name].from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours")
    inputs = normal(2, 4, 8, 8), torch.tensor([5, 9]), torch.tensor([1, 2])
    sample, timestep, labels = inputs
    with torch.no_grad():
        expected = theirs(sample, timestep=timestep, class_labels=labels).sample
        assert error(ours(*inputs).sample, expected) <= TOLERANCE
        assert error(again(*inputs).sample, expected) <= TOLERANCE


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("UNet2DModel", {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "'CrossAttnDownBlock2D'; it serves"),
    ("UNet2DModel", {"norm_num_groups": None}, "only where all blocks are Skip blocks"),
    ("UNet2DModel", {"attention_head_dim": 24}, "32 channels do not divide into 24|64 channels do not divide into 24"),
    ("UNet2DModel", {"time_embedding_type": "learned"}, "needs num_train_timesteps"),
    ("UNet2DModel", {"class_embed_type": "projection"}, "class_embed_type='projection'"),
    ("UNet2DModel", {"resnet_time_scale_shift": "spatial"}, "'spatial'"),
    ("Transformer2DModel", {"norm_type": "layer_norm"}, "norm_type='layer_norm'"),
    ("Transformer2DModel", {"cross_attention_dim": 32}, "cross_attention_dim=32"),
    ("Transformer2DModel", {"num_embeds_ada_norm": None}, "needs numbers for num_embeds_ada_norm"),
    ("Transformer2DModel", {"attention_head_dim": 3, "num_attention_heads": 1}, "multiple of 4"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_configurations_that_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MODELS[name](**{**(UNET if name == "UNet2DModel" else DIT), **change})


@pytest.mark.parametrize("model", [UNet2DModel, DiTTransformer2DModel])
def test_configuration_keys_and_defaults_are_those_of_diffusers(model: type[Any]) -> None:
    parameters = inspect.signature(getattr(diffusers, model.__name__).__init__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    assert dict(model.DEFAULTS) == defaults
