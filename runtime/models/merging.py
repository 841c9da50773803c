"""Token merging: half of the tokens of self-attention, where pixels are many. The rewrite "token-merging"."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from anamorph.errors import InputError


@dataclass(frozen=True)
class Merged:
    """The tokens that are left, and for each of the original ones [B, h w] the place of the one that stands for it."""

    tokens: Tensor
    places: Tensor

    def apart(self, values: Tensor) -> Tensor:
        """What was computed for the tokens that are left [B, h w / 2, C], for the original ones [B, h w, C]."""
        return values.gather(1, self.places[..., None].expand(-1, -1, values.shape[-1]))


def merged(tokens: Tensor, height: int, width: int) -> Merged:
    """Half of the tokens [B, h w, C] of a picture: h and w are even.

    One pixel of each 2x2 cell receives; of the other three quarters, the third whose cosine to its nearest receiver is
    the largest joins that one, and each receiver becomes the mean of itself and those that joined.
    Source: Bolya and Hoffman 2023 (arXiv:2303.17604), section 4, with a ratio of one half and without chance; Bolya et
    al. 2022 (arXiv:2210.09461), section 3. Raises InputError: a side is odd.
    """
    if isinstance(height, int) and isinstance(width, int) and (height % 2 or width % 2):
        raise InputError(
            f"token merging pairs the sides of latents, which are {height}x{width}; draw a size of even latents, or "
            "leave the rewrite out"
        )
    cells = _cells(tokens, height, width)  # [B, h w / 4, 4, C]
    receivers, others = cells[:, :, 0], cells[:, :, 1:].flatten(1, 2)
    count = receivers.shape[1]
    closeness = F.normalize(others, dim=-1) @ F.normalize(receivers, dim=-1).transpose(1, 2)
    nearest = closeness.argmax(-1)
    # Places in the order of closeness, the least close first: the first third stays.
    order = closeness.amax(-1).argsort(-1)
    rank = order.argsort(-1)
    joins = rank >= count
    numbers = torch.arange(count, device=tokens.device)
    weights = ((nearest[..., None] == numbers) & joins[..., None]).to(tokens.dtype)
    mean = (receivers + weights.transpose(1, 2) @ others) / (1 + weights.sum(1)[..., None])
    stay = others.gather(1, order[:, :count, None].expand(-1, -1, others.shape[-1]))
    places = torch.where(joins, nearest, count + rank)
    every = torch.cat((numbers.expand_as(nearest[:, :count])[..., None], torch.unflatten(places, 1, (-1, 3))), dim=2)
    return Merged(torch.cat((mean, stay), dim=1), _lines(every, height, width))


def _cells(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, h w, C] -> [B, h w / 4, 4, C]: the pixels of each 2x2 cell side by side."""
    grid = tokens.reshape(-1, height // 2, 2, width // 2, 2, tokens.shape[-1])
    return grid.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def _lines(values: Tensor, height: int, width: int) -> Tensor:
    """[B, h w / 4, 4] -> [B, h w]: cells as lines of pixels again."""
    return values.reshape(-1, height // 2, width // 2, 2, 2).permute(0, 1, 3, 2, 4).flatten(1)
