"""Everything that a UNet may be told besides time and text, compared with diffusers on the same weights."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoints import UNET
from model_parity import TOLERANCE, error, normal, pair
from torch import Tensor

from anamorph.errors import ConfigError, InputError
from anamorph.models import UNet2DConditionModel

TEXT = normal(2, 7, 32, seed=1)
XL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}
SIMPLE: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 16,
}
DEEPFLOYD: dict[str, Any] = {
    **SIMPLE,
    "encoder_hid_dim": 48,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_norm": "group_norm",
    "cross_attention_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.41421,
    "time_embedding_act_fn": "gelu",
    "act_fn": "gelu",
    "mid_block_scale_factor": 1.41421,
    "class_embed_type": "timestep",
}
UPSCALER: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 5,
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
    "mid_block_type": None,
    "up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": None,
    "act_fn": "gelu",
    "attention_head_dim": 16,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "time_embedding_dim": 64,
    "time_cond_proj_dim": 20,
    "timestep_post_act": "gelu",
}
TIME_IDS = torch.tensor([[512.0, 768, 0, 16, 512, 768], [1024, 1024, 3, 0, 640, 1]])
POOLED = {"text_embeds": normal(2, 24, seed=5), "time_ids": TIME_IDS}
IMAGE = {"image_embeds": normal(2, 32, seed=6)}
LABELS = torch.tensor([3, 19])

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sdxl": (XL, {"added_cond_kwargs": POOLED}),
    "refiner": (
        {**XL, "projection_class_embeddings_input_dim": 5 * 8 + 24},
        {"added_cond_kwargs": {**POOLED, "time_ids": TIME_IDS[:, :5]}},
    ),
    "lcm": ({"time_cond_proj_dim": 16}, {"timestep_cond": normal(2, 16, seed=2)}),
    "sdxl, lcm": (
        {**XL, "time_cond_proj_dim": 16},
        {"added_cond_kwargs": POOLED, "timestep_cond": normal(2, 16, seed=2)},
    ),
    "noise level": ({"num_class_embeds": 20, "in_channels": 7}, {"class_labels": LABELS}),
    "timestep labels": ({"class_embed_type": "timestep"}, {"class_labels": LABELS}),
    "identity labels": ({"class_embed_type": "identity"}, {"class_labels": normal(2, 128, seed=3)}),
    "projected labels": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        {"class_labels": normal(2, 12, seed=3)},
    ),
    "simply projected labels": (
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
        {"class_labels": normal(2, 12, seed=3)},
    ),
    "joined labels": (
        {
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 12,
            "class_embeddings_concat": True,
        },
        {"class_labels": normal(2, 12, seed=3)},
    ),
    "projected text": ({"encoder_hid_dim": 32, "cross_attention_dim": 40}, {}),
    "text and image": (
        {"addition_embed_type": "text_image", "encoder_hid_dim": 32, "encoder_hid_dim_type": "text_image_proj"},
        {"added_cond_kwargs": {**IMAGE, "text_embeds": normal(2, 32, seed=7)}},
    ),
    "image": (
        {
            "addition_embed_type": "image",
            "encoder_hid_dim": 32,
            "encoder_hid_dim_type": "image_proj",
            "cross_attention_dim": 24,
        },
        {"added_cond_kwargs": IMAGE},
    ),
    "pooled text": ({"addition_embed_type": "text", "addition_embed_type_num_heads": 8}, {}),
    "masked text": ({}, {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 6 + [0]])}),
    "scale and shift": ({"resnet_time_scale_shift": "scale_shift"}, {}),
    "fourier": ({"time_embedding_type": "fourier"}, {}),
    "activations": ({"act_fn": "mish", "timestep_post_act": "silu", "time_embedding_act_fn": "gelu"}, {}),
    "no middle": ({"mid_block_type": None}, {}),
    "plain middle": ({"mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1.5}, {}),
    "simple": (SIMPLE, {}),
    "simple, layer norm": ({**SIMPLE, "cross_attention_norm": "layer_norm", "block_out_channels": (32, 32)}, {}),
    "simple, only text": ({**SIMPLE, "only_cross_attention": True}, {}),
    "simple, masked": (SIMPLE, {"encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3, [1] * 7])}),
    "pixel attention": (
        {
            "down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "AttnUpBlock2D"),
        },
        {},
    ),
    "depths of each layer": (
        {
            **XL,
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, (1, 3)),
            "reverse_transformer_layers_per_block": ((1, 2, 1), 1),
            "mid_block_type": "UNetMidBlock2D",
        },
        {"added_cond_kwargs": POOLED},
    ),
    "k-diffusion": (UPSCALER, {"timestep_cond": normal(2, 20, seed=2)}),
    "k-diffusion, attention on top": (
        {
            **UPSCALER,
            "down_block_types": ("KCrossAttnDownBlock2D",) * 3 + ("KDownBlock2D",),
            "up_block_types": ("KUpBlock2D",) + ("KCrossAttnUpBlock2D",) * 3,
            "time_embedding_dim": 48,
        },
        {"timestep_cond": normal(2, 20, seed=2)},
    ),
}


def inputs(ours: UNet2DConditionModel) -> tuple[Tensor, Tensor]:
    """A sample and a text of the model's widths."""
    width = ours.config.encoder_hid_dim or ours.config.cross_attention_dim
    return normal(2, ours.config.in_channels, 24, 16), normal(2, 7, width, seed=1)


@pytest.mark.parametrize("case", CASES)
def test_conditions_equal_diffusers(case: str) -> None:
    config, conditions = CASES[case]
    ours, theirs = pair("UNet2DConditionModel", {**UNET, **config})
    sample, text = inputs(ours)
    with torch.no_grad():
        for timestep in (torch.tensor([7, 811]), 3.5):
            expected = theirs(sample, timestep, text, **conditions).sample
            assert error(ours(sample, timestep, text, **conditions).sample, expected) <= TOLERANCE


@pytest.mark.parametrize("case", ["sdxl, lcm", "noise level", "k-diffusion", "text and image", "simple"])
def test_loads_what_diffusers_saved_and_back(case: str, tmp_path: Path) -> None:
    config, conditions = CASES[case]
    _, theirs = pair("UNet2DConditionModel", {**UNET, **config})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet2DConditionModel.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    sample, text = inputs(ours)
    with torch.no_grad():
        expected = theirs(sample, 7, text, **conditions).sample
        assert error(ours(sample, 7, text, **conditions).sample, expected) <= TOLERANCE
        assert torch.equal(again(sample, 7, text, **conditions).sample, expected)


@pytest.mark.parametrize("case", [name for name, (_, conditions) in CASES.items() if conditions])
def test_conditions_matter(case: str) -> None:
    """A condition that is one hundredth off is seen: parity is no accident of a condition without effect."""
    config, conditions = CASES[case]
    ours, _ = pair("UNet2DConditionModel", {**UNET, **config})
    sample, text = inputs(ours)
    with torch.no_grad():
        expected = ours(sample, 7, text, **conditions).sample
        for name, changed in perturbed(conditions):
            assert error(ours(sample, 7, text, **changed).sample, expected) > 3 * TOLERANCE, name


def perturbed(conditions: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The conditions with one of them slightly wrong, each in turn."""
    flat = [((name,), value) for name, value in conditions.items() if isinstance(value, Tensor)]
    flat += [(("added_cond_kwargs", name), value) for name, value in conditions.get("added_cond_kwargs", {}).items()]
    results = []
    for path, value in flat:
        wrong = value.roll(1, -1) if value.dtype == torch.int64 else value * 1.01 + 1e-2
        inner = {**conditions[path[0]], path[1]: wrong} if len(path) == 2 else wrong
        results.append((path[-1], {**conditions, path[0]: inner}))
    return results


@pytest.mark.parametrize("middle", [False, True])
def test_adapter_residuals(middle: bool) -> None:
    ours, theirs = pair("UNet2DConditionModel", UNET)
    sample = normal(2, 4, 8, 8)
    residuals = [normal(2, 32, 8, 8, seed=2), normal(2, 64, 4, 4, seed=3)]
    residuals += [normal(2, 64, 4, 4, seed=4)] * middle
    with torch.no_grad():
        adapted = ours(sample, 5, TEXT, down_intrablock_additional_residuals=residuals).sample
        expected = theirs(sample, 5, TEXT, down_intrablock_additional_residuals=list(residuals)).sample
        assert error(adapted, expected) <= TOLERANCE
        wrong = [residuals[0] * 1.001, *residuals[1:]]
        assert error(ours(sample, 5, TEXT, down_intrablock_additional_residuals=wrong).sample, adapted) > 2e-5
    with pytest.raises(InputError, match=r"holds 1 tensors, expected one per block of the way down \(2\)"):
        ours(sample, 5, TEXT, down_intrablock_additional_residuals=residuals[:1])


def test_adapter_and_control_together() -> None:
    ours, theirs = pair("UNet2DConditionModel", UNET)
    sample = normal(2, 4, 8, 8)
    inside = [normal(2, 32, 8, 8, seed=2), normal(2, 64, 4, 4, seed=3)]
    shapes = [(32, 8), (32, 8), (32, 4), (64, 4)]
    control = {
        "down_block_additional_residuals": [normal(2, c, s, s, seed=c + s) for c, s in shapes],
        "mid_block_additional_residual": normal(2, 64, 4, 4, seed=9),
    }
    with torch.no_grad():
        both = ours(sample, 5, TEXT, down_intrablock_additional_residuals=inside, **control).sample
        expected = theirs(sample, 5, TEXT, down_intrablock_additional_residuals=list(inside), **control).sample
    assert error(both, expected) <= TOLERANCE


REFUSED_CALLS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (XL, {}, r"needs added_cond_kwargs\['text_embeds'\]"),
    (XL, {"added_cond_kwargs": {"text_embeds": POOLED["text_embeds"]}}, r"needs added_cond_kwargs\['time_ids'\]"),
    ({}, {"added_cond_kwargs": POOLED}, r"takes no added_cond_kwargs\['text_embeds'\]"),
    ({}, {"class_labels": LABELS}, "takes no class_labels"),
    ({"num_class_embeds": 20}, {}, "needs class_labels"),
    ({}, {"timestep_cond": normal(2, 16)}, "takes no timestep_cond"),
    ({}, {"cross_attention_kwargs": {"scale": 0.5}}, r"cross_attention_kwargs, got \['scale'\]"),
]


@pytest.mark.parametrize(("config", "conditions", "message"), REFUSED_CALLS, ids=[case[2] for case in REFUSED_CALLS])
def test_conditions_that_do_not_fit(config: dict[str, Any], conditions: dict[str, Any], message: str) -> None:
    ours = UNet2DConditionModel(**{**UNET, **config})
    with pytest.raises(InputError, match=message):
        ours(normal(2, 4, 8, 8), 5, TEXT, **conditions)


def test_a_text_is_needed() -> None:
    with pytest.raises(InputError, match="needs encoder_hidden_states"):
        UNet2DConditionModel(**UNET)(normal(2, 4, 8, 8), 5, None)


@pytest.mark.parametrize("config", [UPSCALER, SIMPLE], ids=["k-diffusion", "simple"])
def test_odd_sizes_are_refused_where_resolutions_double_exactly(config: dict[str, Any]) -> None:
    ours = UNet2DConditionModel(**{**UNET, **config}).eval()
    with pytest.raises(InputError, match=r"multiples of [28]"):
        ours(normal(1, ours.config.in_channels, 9, 8), 5, TEXT[:1])


def test_adapters_do_not_fit_k_diffusion() -> None:
    ours = UNet2DConditionModel(**{**UNET, **UPSCALER}).eval()
    with pytest.raises(InputError, match="k-diffusion take no"):
        ours(normal(1, 8, 8, 8), 5, TEXT[:1], down_intrablock_additional_residuals=[torch.zeros(1)] * 4)


REFUSED_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"attention_type": "gated"}, "attention_type='gated'"),
    ({"addition_embed_type": "image_hint"}, "addition_embed_type='image_hint'"),
    ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type='ip_image_proj'"),
    ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
    ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim"),
    ({"addition_embed_type": "text_time"}, "addition_time_embed_dim"),
    ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim, got None"),
    ({"norm_num_groups": None}, "norm_num_groups=None"),
    ({"resnet_skip_time_act": True}, "resnet_skip_time_act"),
    ({"down_block_types": ("KDownBlock2D", "DownBlock2D")}, "blocks of k-diffusion beside others"),
    ({"transformer_layers_per_block": ((1,), (1,))}, "reverse_transformer_layers_per_block"),
    ({**UPSCALER, "time_embedding_dim": 48}, "time_embedding_dim"),
    ({**SIMPLE, "attention_head_dim": 24}, "channels do not divide into 24 channels per head"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_CONFIGS, ids=[case[1] for case in REFUSED_CONFIGS])
def test_configurations_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNet2DConditionModel(**{**UNET, **change})


def test_every_argument_of_forward_is_one_of_diffusers() -> None:
    theirs = list(inspect.signature(diffusers.UNet2DConditionModel.forward).parameters)
    assert [name for name in inspect.signature(UNet2DConditionModel.forward).parameters if name not in theirs] == []
