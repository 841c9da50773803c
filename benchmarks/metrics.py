"""Measures of pictures that need other models, whose weights are local files: through torchmetrics.

Pictures are float arrays [N, H, W, 3] in 0..1. Everything raises BackendUnavailable where a package is missing, and
CheckpointError where weights cannot be read.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anamorph.errors import BackendUnavailable, CheckpointError, InputError

if TYPE_CHECKING:
    import torch

Pictures = NDArray[np.floating[Any]]


def ssim(a: Pictures, b: Pictures) -> float:
    """Structural similarity, Gaussian windows of 11 pixels, mean (Wang et al. 2004, eq. 13)."""
    function = _metric("functional.image", "structural_similarity_index_measure")
    return float(function(_tensor(a), _tensor(b), data_range=1.0))


def lpips(a: Pictures, b: Pictures, network: str = "alex") -> float:
    """Distance of deep features, mean (Zhang et al. 2018, arXiv:1801.03924); torchvision has the networks.

    Their weights are those in torch.hub's cache.
    """
    function = _metric("functional.image", "learned_perceptual_image_patch_similarity")
    try:
        return float(function(_tensor(a), _tensor(b), net_type=network, normalize=True))
    except ModuleNotFoundError:
        raise BackendUnavailable("LPIPS needs torchvision and its weights; run: pip install torchvision") from None


def clip_score(pictures: Pictures, texts: Sequence[str], folder: Path) -> float:
    """100 max(0, cos(E_image, E_text)), mean (Hessel et al. 2021, arXiv:2104.08718), by a CLIPModel's folder."""
    _as_many(pictures, texts)
    function = _metric("functional.multimodal", "clip_score")
    score = function(list(_bytes(pictures)), list(texts), model_name_or_path=lambda: _clip(folder))
    return float(score.detach())


def directional_similarity(
    before: Pictures, after: Pictures, told_before: Sequence[str], told_after: Sequence[str], folder: Path
) -> float:
    """cos(E_image(after) - E_image(before), E_text(after) - E_text(before)), mean (Gal et al. 2021, arXiv:2108.00946).

    How well a change of pictures follows a change of their descriptions.
    """
    import torch

    for pictures, texts in ((before, told_before), (after, told_after), (before, told_after)):
        _as_many(pictures, texts)
    model, processor = _clip(folder)

    def images(pictures: Pictures) -> "torch.Tensor":
        given = processor(images=list(_bytes(pictures)), return_tensors="pt")
        return model.get_image_features(given["pixel_values"])

    def words(texts: Sequence[str]) -> "torch.Tensor":
        given = processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return model.get_text_features(**given)

    with torch.no_grad():
        moved = torch.cosine_similarity(images(after) - images(before), words(told_after) - words(told_before))
    return float(moved.mean())


def fid(real: Pictures, drawn: Pictures, network: "torch.nn.Module") -> float:
    """Frechet distance of two sets' features, |m - n|^2 + tr(C + D - 2 (C D)^1/2) (Heusel et al. 2017, eq. 6).

    `network` maps uint8 pictures [N, 3, H, W] to features [N, F]; see `inception`.
    """
    metric = _metric("image.fid", "FrechetInceptionDistance")(feature=network, input_img_size=(3, *real.shape[1:3]))
    metric.update(_bytes(real), real=True)
    metric.update(_bytes(drawn), real=False)
    return float(metric.compute())


def inception(file: Path) -> "torch.nn.Module":
    """Features of Inception as a TorchScript file holds it, such as NVIDIA's `inception-2015-12-05.pt`."""
    import torch

    class Features(torch.nn.Module):
        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network = network

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.network(pictures, return_features=True)
            return found

    try:
        load: Callable[..., Any] = torch.jit.load
        return Features(load(str(file), map_location="cpu")).eval()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} is no TorchScript network: {str(error).splitlines()[0]}") from None


class Clip:
    """A CLIPModel as torchmetrics calls it: newer versions of transformers wrap the features that they return."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model.eval(), model.config

    def to(self, _: Any) -> "Clip":
        """It stays where it is."""
        return self

    def get_image_features(self, pixel_values: "torch.Tensor") -> "torch.Tensor":
        """[N, F]"""
        found: torch.Tensor = self.model.get_image_features(pixel_values).pooler_output
        return found

    def get_text_features(self, input_ids: "torch.Tensor", attention_mask: "torch.Tensor") -> "torch.Tensor":
        """[N, F]"""
        found: torch.Tensor = self.model.get_text_features(input_ids, attention_mask).pooler_output
        return found


def _clip(folder: Path) -> tuple[Clip, Any]:
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise BackendUnavailable("scores of CLIP need transformers; run: pip install transformers") from None
    try:
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        return Clip(CLIPModel.from_pretrained(folder, local_files_only=True)), processor
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no CLIPModel with its processor: {str(error).splitlines()[0]}") from None


def _metric(module: str, name: str) -> Callable[..., Any]:
    import importlib

    try:
        found: Callable[..., Any] = getattr(importlib.import_module(f"torchmetrics.{module}"), name)
    except ImportError:
        raise BackendUnavailable("these measures need torchmetrics; run: pip install 'anamorph[quality]'") from None
    return found


def _as_many(pictures: Pictures, texts: Sequence[str]) -> None:
    if len(pictures) != len(texts):
        raise InputError(f"there are {len(pictures)} pictures and {len(texts)} texts; give one text for each")


def _tensor(pictures: Pictures) -> "torch.Tensor":
    import torch

    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), np.float32))


def _bytes(pictures: Pictures) -> "torch.Tensor":
    return (_tensor(pictures) * 255).round().byte()
