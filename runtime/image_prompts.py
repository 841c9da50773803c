"""What a UNet takes of pictures that are prompts (IP-Adapter, arXiv:2308.06721): optional inputs, for every engine.

An adapter has keys and values of its own for each attention to the text, which are computed once per picture:

    attention(Q, K, V) + sum_g m_g softmax(Q K_g^T / sqrt(d) + b_g) V_g

with one term for each group of tokens that share a softmax. Scales of adapters and of blocks are part of V_g, so that
graphs know nothing of them, and absent inputs, which are zeros, add nothing. No PyTorch here.
"""

from collections.abc import Mapping
from typing import Any

from anamorph.conditions import IMAGE_BIAS, IMAGE_KEYS, IMAGE_VALUES, mask_name, projection
from anamorph.interface import Axis, Port, Scaled
from anamorph.native import attentions, unshaped

GROUPS, TOKENS = Axis("image_groups"), Axis("image_tokens")
"""Groups of tokens, each with a softmax of its own, and the tokens of the largest; others are filled up."""


def image_ports(config: Mapping[str, Any]) -> tuple[Port, ...]:
    """The inputs for pictures as prompts, all optional; none where the model has no place for them.

    Keys and values [B, G, T, sum of widths] lie side by side as those of the text do. `image_bias` [B, G, T] is added
    to scores, to leave out tokens that fill a group up. `image_masks.k` [B, G, h, w] is m_g - 1 for each pixel at
    level k, 1 / 2^k of the latents' size.
    """
    if not takes_images(config):
        return ()
    batch, places = Axis("batch"), attentions(config)
    tokens = (batch, GROUPS, TOKENS)
    width = sum(one.width * one.depth for one in places)
    made = [Port(name, (*tokens, width), optional=True) for name in (IMAGE_KEYS, IMAGE_VALUES)]
    made.append(Port(IMAGE_BIAS, tokens, optional=True))
    for level in sorted({one.level for one in places}):
        sides = (Scaled("latent_height", 1, 2**level), Scaled("latent_width", 1, 2**level))
        made.append(Port(mask_name(level), (batch, GROUPS, *sides), optional=True))
    return tuple(made)


def takes_images(config: Mapping[str, Any]) -> bool:
    """Whether a denoiser of that configuration has attentions to a text, and none to pictures of its own."""
    plain = unshaped("UNet2DConditionModel", config) is None and projection(config) in (None, "text_proj")
    return plain and isinstance(config["cross_attention_dim"], int) and bool(attentions(config))
