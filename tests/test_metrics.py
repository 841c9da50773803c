"""Measures by other models beside their formulas, on tiny random networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from transformers import CLIPConfig, CLIPModel

from anamorph import ClipTokenizer
from anamorph.benchmarks import metrics
from anamorph.checkpoint import BUNDLED
from anamorph.errors import BackendUnavailable, CheckpointError, InputError

TEXTS = ["red apple", "a rocket in the night", "cat"]


@pytest.fixture(name="clip", scope="module")
def _clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel of few weights with the bundled vocabulary."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = ClipTokenizer.from_pretrained(BUNDLED / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 32, **ids}
    vision = {**small, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    for path in (BUNDLED / "tokenizer").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", **size}))
    return folder


@pytest.fixture(name="pictures", scope="module")
def _pictures() -> np.ndarray:
    return np.random.default_rng(0).random((3, 16, 16, 3))


def embedded(clip: Path, pictures: np.ndarray, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of pictures and texts, through the model's own call."""
    model, processor = metrics._clip(clip)
    images = [(255 * picture).round().astype(np.uint8) for picture in pictures]
    with torch.no_grad():
        given = processor(text=texts, images=images, return_tensors="pt", padding=True)
        found = model.model(**given)
    return found.image_embeds.numpy(), found.text_embeds.numpy()


def test_ssim_is_the_papers_formula_with_scipys_windows() -> None:
    random = np.random.default_rng(0)
    a = random.random((24, 30, 3))
    b = np.clip(a + 0.1 * random.standard_normal(a.shape), 0, 1)

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, axes=(0, 1), radius=5, mode="mirror")

    m, n = mean(a), mean(b)
    v, w, c = mean(a * a) - m * m, mean(b * b) - n * n, mean(a * b) - m * n
    exact = ((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4))).mean()
    assert metrics.ssim(a[None], b[None]) == pytest.approx(exact, rel=1e-5)


def test_the_clip_score_is_the_cosine(clip: Path, pictures: np.ndarray) -> None:
    images, texts = embedded(clip, pictures, TEXTS)
    mean = 100 * (images * texts).sum(-1).mean()
    assert metrics.clip_score(pictures, TEXTS, clip) == pytest.approx(max(0.0, mean), abs=1e-3)
    with pytest.raises(InputError, match="3 pictures and 1 texts"):
        metrics.clip_score(pictures, TEXTS[:1], clip)


def test_a_change_of_pictures_is_compared_with_that_of_texts(clip: Path, pictures: np.ndarray) -> None:
    clip_model, processor = metrics._clip(clip)
    model = clip_model.model
    after, told = 1 - pictures, ["green pear", "umbrella", "a big dog"]
    with torch.no_grad():

        def image(values: np.ndarray) -> torch.Tensor:
            given = processor(images=[(255 * one).round().astype(np.uint8) for one in values], return_tensors="pt")
            return model.visual_projection(model.vision_model(**given).pooler_output)

        def text(values: list[str]) -> torch.Tensor:
            given = processor(text=values, return_tensors="pt", padding=True)
            return model.text_projection(model.text_model(**given).pooler_output)

        moved, meant = image(after) - image(pictures), text(told) - text(TEXTS)
    exact = ((moved * meant).sum(-1) / moved.norm(dim=-1) / meant.norm(dim=-1)).mean()
    found = metrics.directional_similarity(pictures, after, TEXTS, told, clip)
    assert found == pytest.approx(float(exact), abs=1e-4)


def test_fid_is_the_distance_of_two_normal_distributions(tmp_path: Path) -> None:
    class Network(torch.nn.Module):
        def forward(self, pictures: torch.Tensor, return_features: bool) -> torch.Tensor:
            assert return_features
            return pictures.double().mean((2, 3)) / 255

    path = tmp_path / "network.pt"
    torch.jit.script(Network()).save(str(path))
    random = np.random.default_rng(0)
    real, drawn = random.random((50, 8, 8, 3)), random.random((60, 8, 8, 3)) ** 2
    sets = [np.round(255 * values).mean((1, 2)) / 255 for values in (real, drawn)]
    (m, n), (c, d) = [values.mean(0) for values in sets], [np.cov(values.T) for values in sets]
    exact = ((m - n) ** 2).sum() + np.trace(c + d - 2 * np.real(sqrtm(c @ d)))
    assert metrics.fid(real, drawn, metrics.inception(path)) == pytest.approx(exact, rel=1e-3)


def test_what_is_missing_is_named(tmp_path: Path, pictures: np.ndarray) -> None:
    with pytest.raises(CheckpointError, match="no CLIPModel"):
        metrics.clip_score(pictures, TEXTS, tmp_path)
    (tmp_path / "x.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no TorchScript"):
        metrics.inception(tmp_path / "x.pt")
    with pytest.raises(BackendUnavailable, match="pip install torchvision"):
        metrics.lpips(pictures, pictures)
