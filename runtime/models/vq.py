"""The autoencoder whose latents are entries of a codebook."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

from torch import Tensor, nn

from anamorph.config import Config
from anamorph.models.blocks import Residual
from anamorph.models.outputs import DecoderOutput, VQEncoderOutput
from anamorph.models.picturing import Picturing
from anamorph.models.pixel_attention import renamed
from anamorph.models.vae_blocks import Decoder, Encoder, check_blocks


class Codebook(nn.Module):
    """Each pixel's vector replaced by the nearest entry: [B, c, h, w] -> [B, c, h, w].

    Source: van den Oord et al. 2017 (arXiv:1711.00937), equation 2.
    """

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(entries, width)

    def forward(self, z: Tensor) -> Tensor:
        entries = self.embedding.weight
        # argmin |z - e|^2 = argmax 2 z.e - |e|^2
        nearness = 2 * (z.permute(0, 2, 3, 1) @ entries.transpose(0, 1)) - (entries * entries).sum(dim=1)
        chosen: Tensor = self.embedding(nearness.argmax(-1)).permute(0, 3, 1, 2)
        return chosen


class VQModel(Picturing):
    """The vector-quantised autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.1)."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 3,
        "sample_size": 32,
        "num_vq_embeddings": 256,
        "norm_num_groups": 32,
        "vq_embed_dim": None,
        "scaling_factor": 0.18215,
        "norm_type": "group",
        "mid_block_add_attention": True,
        "lookup_from_codebook": False,
        "force_upcast": False,
    }
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu", "swish"),
        "norm_type": ("group",),
        "lookup_from_codebook": (False,),
    }
    POINTWISE: ClassVar[tuple[str, ...]] = ("*.attentions.0.to_*.weight",)
    PARTS: ClassVar[Mapping[str, str]] = {"vae_encoder": "latents", "vae_decoder": "pixels"}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        full, latents = self.config, self.config.latent_channels
        common = Residual(full.norm_num_groups, eps=1e-6)
        width = full.vq_embed_dim or latents
        self.encoder = Encoder(full, common, latents)
        self.quant_conv = nn.Conv2d(latents, width, 1)
        self.quantize = Codebook(full.num_vq_embeddings, width)
        self.post_quant_conv = nn.Conv2d(width, latents, 1)
        self.decoder = Decoder(full, common)

    @classmethod
    def complete(cls, config: Mapping[str, Any]) -> Config:
        full = super().complete(config)
        check_blocks(cls.__name__, full)
        return full

    @classmethod
    def rename(cls, name: str) -> str:
        return renamed(name)

    def latents(self, sample: Tensor) -> tuple[Tensor]:
        """Pictures in -1..1 [B, C, H, W] -> latents before they are quantised, ([B, c, h, w],)."""
        return (self.quant_conv(self.encoder(sample)),)

    def pixels(self, latent_sample: Tensor) -> tuple[Tensor]:
        """Unscaled latents [B, c, h, w], quantised here -> pictures in about -1..1, ([B, C, H, W],)."""
        return (self.decoder(self.post_quant_conv(self.quantize(latent_sample))),)

    @overload
    def encode(self, x: Tensor, return_dict: Literal[True] = True) -> VQEncoderOutput: ...
    @overload
    def encode(self, x: Tensor, return_dict: bool) -> VQEncoderOutput | tuple[Tensor]: ...
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Pictures in -1..1 [B, C, H, W] -> latents before they are quantised [B, c, h, w]."""
        return VQEncoderOutput(*self.latents(x)) if return_dict else self.latents(x)

    @overload
    def decode(
        self, h: Tensor, force_not_quantize: bool = False, return_dict: Literal[True] = True
    ) -> DecoderOutput: ...
    @overload
    def decode(
        self, h: Tensor, force_not_quantize: bool = False, *, return_dict: bool
    ) -> DecoderOutput | tuple[Tensor]: ...
    def decode(
        self, h: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Unscaled latents [B, c, h, w] -> pictures in about -1..1 [B, C, H, W]."""
        decoded = self.decoder(self.post_quant_conv(h)) if force_not_quantize else self.pixels(h)[0]
        return DecoderOutput(decoded) if return_dict else (decoded,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures -> quantised latents -> pictures."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)
