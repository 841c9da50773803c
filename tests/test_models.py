"""Outputs of the models, compared with diffusers and transformers on the same weights."""

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from checkpoints import CLIP, UNET, VAE, noisy, tiny_clip
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Reference
from model_parity import TOLERANCE, error, normal

from anamorph.errors import ConfigError, InputError
from anamorph.models import MODELS, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel
from anamorph.models.outputs import DiagonalGaussianDistribution


def unets(**changes: Any) -> tuple[UNet2DConditionModel, diffusers.UNet2DConditionModel]:
    """Ours and diffusers', with the same configuration and weights."""
    config = {**UNET, **changes}
    theirs = noisy(diffusers.UNet2DConditionModel(**config), 3)
    ours = UNet2DConditionModel(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def vaes(**changes: Any) -> tuple[AutoencoderKL, diffusers.AutoencoderKL]:
    config = {**VAE, **changes}
    theirs = noisy(diffusers.AutoencoderKL(**config), 1)
    ours = AutoencoderKL(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


THREE_LEVELS = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
UNET_VARIANTS: dict[str, dict[str, Any]] = {
    "sd1": {},
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
    "three levels": THREE_LEVELS,
    "depths": {**THREE_LEVELS, "layers_per_block": (1, 2, 1), "transformer_layers_per_block": (1, 2, 3)},
    "text widths": {"cross_attention_dim": (32, 32)},
    "only text": {"only_cross_attention": True},
    "only text in one level": {"only_cross_attention": (True, False), "attention_head_dim": 2},
    "centred": {"center_input_sample": True, "sample_size": (8, 16)},
    "sines first": {"flip_sin_to_cos": False, "freq_shift": 1},
    "scaled middle": {"mid_block_scale_factor": 1.4142},
    "asymmetric padding": {"downsample_padding": 0},
    "kernels": {"conv_in_kernel": 5, "conv_out_kernel": 1},
    "inpainting": {"in_channels": 9, "out_channels": 3},
    "norm": {"norm_num_groups": 4, "norm_eps": 1e-3},
    "time width": {"time_embedding_dim": 48},
    "one level": {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    },
}


@pytest.mark.parametrize("variant", UNET_VARIANTS)
def test_unet_equals_diffusers(variant: str) -> None:
    ours, theirs = unets(**UNET_VARIANTS[variant])
    text = normal(2, 11, 32, seed=1)
    # Below zero padding the levels of odd sizes do not meet again, in diffusers neither.
    sizes = [(16, 8)] if variant == "asymmetric padding" else [(16, 8), (15, 13)]
    for height, width in sizes:
        sample = normal(2, ours.config.in_channels, height, width)
        with torch.no_grad():
            assert error(ours(sample, 417, text).sample, theirs(sample, 417, text).sample) <= TOLERANCE


@pytest.mark.parametrize(
    "timestep",
    [0, 999, 12.5, np.int64(500), np.float32(3.25), torch.tensor(7), torch.tensor([7]), torch.tensor([1, 900])],
    ids=str,
)
def test_unet_takes_any_kind_of_timestep(timestep: Any) -> None:
    ours, theirs = unets()
    sample, text = normal(2, 4, 8, 8), normal(2, 7, 32, seed=1)
    plain = timestep.item() if isinstance(timestep, np.generic) else timestep
    with torch.no_grad():
        assert error(ours(sample, timestep, text).sample, theirs(sample, plain, text).sample) <= TOLERANCE
        assert torch.equal(ours(sample, timestep, text, return_dict=False)[0], ours(sample, timestep, text).sample)


def test_unet_guidance_embedding() -> None:
    ours, theirs = unets(time_cond_proj_dim=16)
    sample, text, condition = normal(2, 4, 8, 8), normal(2, 7, 32, seed=1), normal(2, 16, seed=2)
    with torch.no_grad():
        expected = theirs(sample, 5, text, timestep_cond=condition).sample
        assert error(ours(sample, 5, text, timestep_cond=condition).sample, expected) <= TOLERANCE
        assert error(ours(sample, 5, text).sample, theirs(sample, 5, text).sample) <= TOLERANCE


def test_unet_control_residuals() -> None:
    ours, theirs = unets()
    sample, text = normal(2, 4, 8, 8), normal(2, 7, 32, seed=1)
    shapes = [(32, 8), (32, 8), (32, 4), (64, 4)]
    down = [normal(2, channels, size, size, seed=seed) for seed, (channels, size) in enumerate(shapes)]
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": normal(2, 64, 4, 4, seed=9)}
    with torch.no_grad():
        controlled = ours(sample, 5, text, **residuals).sample
        assert error(controlled, theirs(sample, 5, text, **residuals).sample) <= TOLERANCE
        assert error(controlled, ours(sample, 5, text).sample) > 0.01
    with pytest.raises(InputError, match="pass both"):
        ours(sample, 5, text, down_block_additional_residuals=down)
    residuals["down_block_additional_residuals"] = down[:3]
    with pytest.raises(InputError, match="holds 3 tensors, expected 4"):
        ours(sample, 5, text, **residuals)


def test_unet_refuses_arguments_that_do_not_fit() -> None:
    ours, _ = unets()
    sample, text = normal(2, 4, 8, 8), normal(2, 7, 32)
    with pytest.raises(InputError, match=r"timestep has shape \[3\]"):
        ours(sample, torch.zeros(3), text)
    with pytest.raises(InputError, match="time_cond_proj_dim"):
        ours(sample, 5, text, timestep_cond=normal(2, 16))


def test_unet_keeps_channels_last() -> None:
    ours, theirs = unets()
    sample, text = normal(2, 4, 16, 16), normal(2, 7, 32, seed=1)
    ours = ours.to(memory_format=torch.channels_last)
    formats = []
    for module in ours.modules():
        if isinstance(module, torch.nn.Conv2d) and module.in_channels > 4:
            module.register_forward_pre_hook(
                lambda _, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
    with torch.no_grad():
        assert error(ours(sample, 5, text).sample, theirs(sample, 5, text).sample) <= TOLERANCE
    assert len(formats) > 20
    assert all(formats)


def test_num_attention_heads_stands_before_attention_head_dim() -> None:
    ours, theirs = unets(attention_head_dim=8)
    other = UNet2DConditionModel(**{**UNET, "attention_head_dim": 2, "num_attention_heads": 8})
    other.load_state_dict(ours.state_dict())
    sample, text = normal(2, 4, 8, 8), normal(2, 7, 32)
    with torch.no_grad():
        assert error(other(sample, 5, text).sample, theirs(sample, 5, text).sample) <= TOLERANCE


VAE_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no attention": {"mid_block_add_attention": False},
    "no 1x1": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
    "layers": {"layers_per_block": 2, "norm_num_groups": 4, "in_channels": 4, "out_channels": 1},
    "four levels": {
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
}


@pytest.mark.parametrize("variant", VAE_VARIANTS)
def test_vae_equals_diffusers(variant: str) -> None:
    ours, theirs = vaes(**VAE_VARIANTS[variant])
    pictures = normal(2, ours.config.in_channels, 40, 24)
    latents = normal(2, ours.config.latent_channels, 5, 7)
    with torch.no_grad():
        posterior, expected = ours.encode(pictures).latent_dist, theirs.encode(pictures).latent_dist
        assert error(posterior.parameters, expected.parameters) <= TOLERANCE
        assert error(ours.decode(latents).sample, theirs.decode(latents).sample) <= TOLERANCE
        assert error(ours(pictures).sample, theirs(pictures).sample) <= TOLERANCE
        assert torch.equal(ours.encode(pictures, False)[0].mean, posterior.mean)
        assert torch.equal(ours.decode(latents, False)[0], ours.decode(latents).sample)


def test_vae_takes_odd_sizes() -> None:
    ours, theirs = vaes()
    with torch.no_grad():
        pictures = normal(1, 3, 33, 21)
        moments = theirs.encode(pictures).latent_dist.parameters
        assert error(ours.encode(pictures).latent_dist.parameters, moments) <= TOLERANCE


def test_latent_distribution() -> None:
    parameters = 40 * normal(2, 8, 3, 3)
    ours, other = DiagonalGaussianDistribution(parameters), DiagonalGaussianDistribution(parameters / 9)
    theirs, reference = Reference(parameters), Reference(parameters / 9)
    assert ours.logvar.min() == -30
    assert ours.logvar.max() == 20
    assert torch.equal(ours.mode(), parameters[:, :4])
    assert torch.equal(ours.std, theirs.std)
    assert torch.equal(ours.var, theirs.var)
    assert torch.equal(*(one.sample(torch.Generator().manual_seed(4)) for one in (ours, theirs)))
    assert torch.allclose(ours.kl(), theirs.kl(), rtol=1e-6)
    assert torch.allclose(ours.kl(other), theirs.kl(reference), rtol=1e-6)


def texts(**changes: Any) -> tuple[CLIPTextModel, transformers.CLIPTextModel]:
    theirs = noisy(tiny_clip(50, **{**CLIP, **changes}), 2)
    ours = CLIPTextModel(**{key: getattr(theirs.config, key) for key in CLIPTextModel.DEFAULTS}).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_act": "gelu"}, {"eos_token_id": 2}, {"layer_norm_eps": 1e-2}], ids=str
)
@pytest.mark.parametrize("length", [1, 9, 77])
def test_text_encoder_equals_transformers(changes: dict[str, Any], length: int) -> None:
    ours, theirs = texts(**changes)
    ids = torch.randint(3, 48, (3, length), generator=torch.Generator().manual_seed(length))
    ids[0, length // 2 :] = 49  # several end tokens: the first counts
    ids[1, -1] = 49
    with torch.no_grad():
        output, expected = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
    assert error(output.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
    assert error(output.pooler_output, expected.pooler_output) <= TOLERANCE
    assert len(output.hidden_states) == len(expected.hidden_states) == 3
    for state, reference in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert error(state, reference) <= TOLERANCE


def test_text_encoder_outputs() -> None:
    ours, _ = texts()
    ids = torch.tensor([[48, 5, 49]])
    with torch.no_grad():
        output = ours(ids)
        assert output.hidden_states is None
        assert torch.equal(output[0], output.last_hidden_state)
        assert len(ours(ids, return_dict=False)) == 2
        assert len(ours.states(ids)) == 5
    with pytest.raises(InputError, match="78 tokens, the model takes 77"):
        ours(torch.zeros(1, 78, dtype=torch.int64))


def test_text_projection_equals_transformers() -> None:
    config = transformers.CLIPTextConfig(vocab_size=50, eos_token_id=49, **CLIP)
    theirs = noisy(transformers.CLIPTextModelWithProjection(config), 2)
    ours = CLIPTextModelWithProjection(vocab_size=50, eos_token_id=49, **CLIP).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.tensor([[48, 5, 49, 49], [48, 6, 7, 49]])
    with torch.no_grad():
        output, expected = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
    assert error(output.text_embeds, expected.text_embeds) <= TOLERANCE
    assert error(output.hidden_states[-2], expected.hidden_states[-2]) <= TOLERANCE


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("UNet2DConditionModel", {"block_out_chanels": (32, 64)}, "'block_out_chanels'; did you mean 'block_out_channels'"),
    ("UNet2DConditionModel", {"class_embed_type": "class"}, "class_embed_type='class'"),
    ("UNet2DConditionModel", {"addition_embed_type": "sound"}, "addition_embed_type='sound'"),
    ("UNet2DConditionModel", {"dual_cross_attention": True}, "dual_cross_attention=True"),
    ("UNet2DConditionModel", {"act_fn": "tanh"}, "act_fn='tanh'"),
    ("UNet2DConditionModel", {"dropout": 0.1}, "dropout=0.1"),
    ("UNet2DConditionModel", {"norm_num_groups": None}, "norm_num_groups=None"),
    ("UNet2DConditionModel", {"mid_block_type": "MidBlock"}, "mid_block_type='MidBlock'"),
    (
        "UNet2DConditionModel",
        {"down_block_types": ("DownBlock2D", "SkipDownBlock2D")},
        "down_block_types='SkipDownBlock2D'",
    ),
    ("UNet2DConditionModel", {"up_block_types": ("UpBlock2D",)}, "up_block_types holds 1 values, expected 2"),
    ("UNet2DConditionModel", {"attention_head_dim": (2, 4, 8)}, "attention_head_dim holds 3 values, expected 2"),
    ("UNet2DConditionModel", {"attention_head_dim": 5}, "32 channels do not divide into 5 heads"),
    ("UNet2DConditionModel", {"transformer_layers_per_block": (1, 0)}, "positive numbers"),
    ("UNet2DConditionModel", {"transformer_layers_per_block": (1, (1, 2))}, "gives 2 depths"),
    ("AutoencoderKL", {"act_fn": "relu"}, "act_fn='relu'"),
    ("AutoencoderKL", {"down_block_types": ("AttnDownEncoderBlock2D",) * 2}, "down_block_types="),
    ("AutoencoderKL", {"scaling": 1.0}, "'scaling'; did you mean 'scaling_factor'"),
    ("CLIPTextModel", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("CLIPTextModel", {"attention_dropout": 0.5}, "attention_dropout=0.5"),
    ("CLIPTextModel", {"eos_token_id": (1, 2)}, r"eos_token_id=\(1, 2\)"),
    ("CLIPTextModel", {"num_attention_heads": 5}, "num_attention_heads=5"),
    ("CLIPTextModel", {"quantization_config": {}}, "'quantization_config'"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), REFUSED, ids=[f"{name}-{next(iter(c))}" for name, c, _ in REFUSED]
)
def test_configurations_that_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    base = {"UNet2DConditionModel": UNET, "AutoencoderKL": VAE, "CLIPTextModel": CLIP}[name]
    with pytest.raises(ConfigError, match=message):
        MODELS[name].from_config({**base, **change})


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "AutoencoderKL"])
def test_configuration_keys_and_defaults_are_those_of_diffusers(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    assert dict(MODELS[name].DEFAULTS) == defaults


def test_text_configuration_keys_are_those_of_transformers() -> None:
    defaults = transformers.CLIPTextConfig()
    assert {key: getattr(defaults, key) for key in CLIPTextModel.DEFAULTS} == CLIPTextModel.DEFAULTS
    everything = CLIPTextModel.complete(defaults.to_dict())
    assert everything["transformers_version"] == transformers.__version__
