"""ControlNets: copies of a UNet's way down that look at a picture, and say what the UNet shall add to its states.

Source: Zhang, Rao and Agrawala 2023 (arXiv:2302.05543), section 3.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self, SupportsFloat, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anamorph.config import Config
from anamorph.denoiser_interfaces import controlnet_interface
from anamorph.errors import InputError
from anamorph.guessing import guess_scales
from anamorph.interface import Interface
from anamorph.models.alone import Alone
from anamorph.models.blocks import same_size
from anamorph.models.conditioning import CLASS_TYPES
from anamorph.models.levels import DOWN_BLOCKS, check_level, down_levels, kinds
from anamorph.models.outputs import ControlNetOutput
from anamorph.models.told import Conditions, Text, Time, dealt, mask_bias
from anamorph.models.trunk import Trunk
from anamorph.models.unet_blocks import timesteps
from anamorph.models.unet_config import DEFAULTS as UNET
from anamorph.native import is_hinting

SHARED = (
    "in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type", "only_cross_attention",
    "block_out_channels", "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn",
    "norm_num_groups", "norm_eps", "cross_attention_dim", "transformer_layers_per_block", "encoder_hid_dim",
    "encoder_hid_dim_type", "attention_head_dim", "num_attention_heads", "use_linear_projection", "class_embed_type",
    "addition_embed_type", "addition_time_embed_dim", "num_class_embeds", "upcast_attention",
    "resnet_time_scale_shift", "projection_class_embeddings_input_dim", "addition_embed_type_num_heads",
)  # fmt: skip
"""Keys that a ControlNet's configuration has in common with its UNet's."""
CHANNELS = (16, 32, 96, 256)
"""Of the hint's encoder, which halves the resolution between them."""
Layer = TypeVar("Layer", bound=nn.Module)


class HintEncoder(nn.Module):
    """Convolutions from a picture [B, C, H, W] to a hint [B, C_0, h, w]; each second one halves the resolution.

    Source: Zhang et al. 2023, section 3.2; its last layer begins at zero.
    """

    def __init__(self, pictures: int, channels: Sequence[int], hints: int) -> None:
        super().__init__()
        self.conv_in = same_size(pictures, channels[0], 3)
        self.blocks = nn.ModuleList()
        for before, after in pairwise(channels):
            self.blocks += [same_size(before, before, 3), nn.Conv2d(before, after, 3, padding=1, stride=2)]
        self.conv_out = zero(same_size(channels[-1], hints, 3))

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        hint: Tensor = self.conv_out(x)
        return hint


def zero(layer: Layer) -> Layer:
    """A layer that adds nothing before it is trained."""
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    return layer


class Net(Alone, Trunk):
    """What ControlNets for one kind of picture and for several share."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full, widths = self.config, self.config.block_out_channels
        self.controlnet_cond_embedding = HintEncoder(
            full.conditioning_channels, full.conditioning_embedding_out_channels, widths[0]
        )
        states = [port.axes[1] for port in self._interface().outputs[:-1]]
        self.controlnet_down_blocks = nn.ModuleList(zero(nn.Conv2d(width, width, 1)) for width in states)  # type: ignore[arg-type]
        self.controlnet_mid_block = zero(nn.Conv2d(widths[-1], widths[-1], 1))
        self._place()

    def _layout(self) -> Config:
        return Config({**UNET, **self.config})

    def _interface(self) -> Interface:
        return controlnet_interface(self.config)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        layout = Config({**UNET, **full})
        served = {name: DOWN_BLOCKS[name] for name in ("CrossAttnDownBlock2D", "DownBlock2D")}
        down = kinds(cls.__name__, layout, "down_block_types", served)
        for kind, level in zip(down, down_levels(layout), strict=True):
            check_level(cls.__name__, kind, level)
        return full

    @classmethod
    def _beside(cls, unet: Any, load_weights_from_unet: bool, **own: Any) -> Self:
        """A net for a UNet, with these keys of its own; perhaps with the UNet's weights where both have them."""
        net = cls(**{key: unet.config[key] for key in SHARED if key in cls.DEFAULTS}, **own)
        if load_weights_from_unet:
            known = unet.state_dict()
            net.load_state_dict({name: known[name] for name in net.state_dict() if name in known}, strict=False)
        return net

    def method(self, part: str) -> str:
        return "hint" if is_hinting(part) else super().method(part)

    method.__doc__ = Trunk.method.__doc__

    def _results(self, sample: Tensor, time: Time, text: Text, extra: Conditions) -> tuple[Tensor, ...]:
        x, states = self._descend(sample, time, text, extra)
        residuals = [layer(state) for layer, state in zip(self.controlnet_down_blocks, states, strict=True)]
        if self.config.global_pool_conditions:
            residuals = [_pooled(residual).expand_as(residual) for residual in residuals]
        early = [dealt(residual, text.branches) for residual in residuals[: self.before]]
        mid = self.controlnet_mid_block(x)
        mid = _pooled(mid).expand_as(mid) if self.config.global_pool_conditions else mid
        return (*early, *residuals[self.before :], mid)

    def _weighed(self, results: Sequence[Tensor], scale: float, guess_mode: bool) -> ControlNetOutput:
        """Residuals times `scale`, with `guess_mode` also times 0.1 (the first) to 1 (the middle)."""
        pooled = self.config.global_pool_conditions
        weights = guess_scales(len(results)) if guess_mode and not pooled else (1.0,) * len(results)
        *down, mid = (
            (_pooled(one) if pooled else one) * (scale * weight) for one, weight in zip(results, weights, strict=True)
        )
        return ControlNetOutput(tuple(down), mid)


class ControlNetModel(Net):
    """Residuals for a UNet from x_t, t, a text and a picture: [B, C, h, w], t, [B, S, D], [B, 3, H, W]."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            **{key: UNET[key] for key in SHARED},
            "conditioning_channels": 3,
            "controlnet_conditioning_channel_order": "rgb",
            "conditioning_embedding_out_channels": CHANNELS,
            "global_pool_conditions": False,
        }
    )
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
            "encoder_hid_dim_type": (None, "text_proj"),
            "class_embed_type": CLASS_TYPES[:-1],
            "addition_embed_type": (None, "text", "text_time"),
            "controlnet_conditioning_channel_order": ("rgb", "bgr"),
        }
    )

    @classmethod
    def from_unet(
        cls,
        unet: Any,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: Sequence[int] = CHANNELS,
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> Self:
        """A ControlNet that begins as a copy of a UNet's way down and middle, and adds nothing before it is trained.

        `conditioning_embedding_out_channels`: one channel count more than the autoencoder halves the resolution.
        Raises ConfigError: the UNet is of a kind that has none.
        """
        return cls._beside(
            unet, load_weights_from_unet,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=tuple(conditioning_embedding_out_channels),
            conditioning_channels=conditioning_channels,
        )  # fmt: skip

    def hint(self, picture: Tensor) -> tuple[Tensor]:
        """What the picture adds to the first state: [B, C, H, W] in 0..1 -> [B, C_0, h, w]."""
        if self.config.controlnet_conditioning_channel_order == "bgr":
            picture = torch.cat([picture[:, channel, None] for channel in (2, 1, 0)], dim=1)
        return (self.controlnet_cond_embedding(picture),)

    @overload
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor | None,
        controlnet_cond: Tensor | None,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        hint: Tensor | None = None,
        guess_mode: bool = False,
        return_dict: Literal[True] = True,
    ) -> ControlNetOutput: ...
    @overload
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor | None,
        controlnet_cond: Tensor | None,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        hint: Tensor | None = None,
        guess_mode: bool = False,
        return_dict: bool,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]: ...
    def forward(
        self,
        sample: Tensor,
        timestep: SupportsFloat | Tensor,
        encoder_hidden_states: Tensor | None,
        controlnet_cond: Tensor | None,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        hint: Tensor | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """Residuals of x_t [B, C, h, w] at t (a number, or [B]) under a text [B, S, D] and a picture [B, 3, H, W].

        They are multiplied by `conditioning_scale`, with `guess_mode` also by 0.1 (the first) to 1 (the middle). `hint`
        is what the method of that name made of the picture before, in whose place it comes.
        Raises InputError: a condition is missing, or one is given that this model does not take.
        """
        if (controlnet_cond is None) == (hint is None):
            raise InputError("a ControlNet takes either controlnet_cond, a picture, or the hint that was made of one")
        if controlnet_cond is not None:
            (hint,) = self.hint(controlnet_cond)
        extra = Conditions(None, class_labels, added_cond_kwargs or {}, hint=hint)
        extra.check(self.layout, encoder_hidden_states)
        time = self._time(timesteps(timestep, sample), encoder_hidden_states, extra, sample.dtype)
        mask = mask_bias(attention_mask, sample.dtype)
        results = self._results(sample, time, self._text(encoder_hidden_states, extra, mask), extra)
        weighed = self._weighed(results, conditioning_scale, guess_mode)
        return weighed if return_dict else (weighed.down_block_res_samples, weighed.mid_block_res_sample)


def _pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)
