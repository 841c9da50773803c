"""The depth of a picture as the estimator of a checkpoint finds it, beside transformers and diffusers."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from checkpoints import CLIP, UNET, VAE, noisy, save_pipeline
from exported import exported, once, shared_place
from model_parity import TOLERANCE, error, normal
from parity import IMAGE_BOUND, LATENT_BOUND, listened, ours, worst
from pictures import picture
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from anamorph import DiffusionPipeline, DPTForDepthEstimation, DPTImageProcessor, StableDiffusionDepth2ImgPipeline
from anamorph.cli import main
from anamorph.errors import BackendError, ConfigError, InputError
from anamorph.machine import is_zen
from anamorph.rewrites import ONEDNN, noted

PLAIN: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 48,
    "patch_size": 8, "backbone_out_indices": [0, 1, 3, 4], "neck_hidden_sizes": [8, 12, 16, 20],
    "fusion_hidden_size": 16,
}  # fmt: skip
HYBRID: dict[str, Any] = {
    **PLAIN, "is_hybrid": True, "patch_size": 16, "image_size": 64, "neck_hidden_sizes": [32, 64, 16, 20],
    "reassemble_factors": [1, 1, 1, 0.5], "backbone_featmap_shape": [1, 96, 4, 4],
    "backbone_config": {
        "model_type": "bit", "global_padding": "same", "layer_type": "bottleneck", "depths": [2, 1, 2],
        "hidden_sizes": [32, 64, 96], "embedding_size": 8, "num_groups": 4, "embedding_dynamic_padding": True,
        "out_features": ["stage1", "stage2", "stage3"],
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "hybrid": HYBRID,
    "odd": {**PLAIN, "image_size": 56, "readout_type": "add", "qkv_bias": False},
    "ignoring": {**PLAIN, "readout_type": "ignore", "reassemble_factors": [4, 2, 1, 1]},
}
PROCESSOR: dict[str, Any] = {"size": {"height": 64, "width": 64}}


def reference(config: dict[str, Any]) -> Any:
    model = noisy(transformers.DPTForDepthEstimation(transformers.DPTConfig(**config)), 7)
    with torch.no_grad():
        model.head.head[4].bias.fill_(4)  # else most of what is left after the last ReLU would be zeros
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_depth_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = reference(CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    model = DPTForDepthEstimation.from_pretrained(tmp_path / "theirs")
    pixels = normal(2, 3, CONFIGS[name]["image_size"], CONFIGS[name]["image_size"])
    with torch.no_grad():
        expected = theirs(pixels).predicted_depth
        assert error(model(pixels).predicted_depth, expected) <= TOLERANCE
        assert error(model(pixels + 0.1).predicted_depth, expected) > 10 * TOLERANCE
    model.save_pretrained(tmp_path / "ours")
    again = transformers.DPTForDepthEstimation.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels).predicted_depth, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone_config": {}}, "serves no backbone_config without is_hybrid"),
        ({"use_batch_norm_in_fusion_residual": True}, "use_batch_norm_in_fusion_residual=True"),
        ({"image_size": (384, 512)}, r"image_size=\(384, 512\)"),
        ({"is_hybrid": True, "backbone_config": {"layer_type": "preactivation"}}, "layer_type='preactivation'"),
        ({"is_hybrid": True, "backbone_config": {"depths": [3, 4]}}, r"depths=\(3, 4\), expected 3 of them"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DPTForDepthEstimation(**{**PLAIN, **change})


@pytest.mark.parametrize(
    "config", [{}, PROCESSOR, {"size": {"height": 50, "width": 70}, "ensure_multiple_of": 32}], ids=str
)
def test_pictures_are_prepared_as_transformers_does(config: dict[str, Any], tmp_path: Path) -> None:
    images = [picture(40, 52), picture(100, 30)]
    theirs = DPTImageProcessorPil(**config)
    mine = DPTImageProcessor(**config)(images)
    assert np.abs(mine - theirs(images, return_tensors="np").pixel_values).max() <= 1e-6
    DPTImageProcessor(**config).save_pretrained(tmp_path)
    again = DPTImageProcessorPil.from_pretrained(tmp_path)
    assert np.abs(mine - again(images, return_tensors="np").pixel_values).max() <= 1e-6


def test_the_first_files_give_the_size_as_one_number() -> None:
    assert DPTImageProcessor(size=64).config == DPTImageProcessor(size={"height": 64, "width": 64}).config
    with pytest.raises(ConfigError, match="does not serve keep_aspect_ratio=True"):
        DPTImageProcessor(keep_aspect_ratio=True)


def save(folder: Path) -> None:
    """A checkpoint with a depth estimator."""

    def kind(**parts: Any) -> Any:
        del parts["safety_checker"], parts["requires_safety_checker"], parts["feature_extractor"]
        return diffusers.StableDiffusionDepth2ImgPipeline(
            **parts, depth_estimator=reference(HYBRID), feature_extractor=DPTImageProcessorPil(**PROCESSOR)
        )

    save_pipeline(folder, {**UNET, "in_channels": 5}, VAE, CLIP, "epsilon", kind)


@cache
def checkpoint() -> Path:
    return once(shared_place() / "depth", save)


@cache
def opened() -> Any:
    return StableDiffusionDepth2ImgPipeline.from_pretrained(checkpoint(), backend="eager")


CALL: dict[str, Any] = {"prompt": ["a red cat", "a photo of dogs"], "num_inference_steps": 5, "strength": 0.6,
                        "guidance_scale": 5.0}  # fmt: skip


@pytest.mark.parametrize("images", [[picture(16, 20)], [picture(16, 20), picture(16, 20, hue=1)]], ids=["one", "two"])
def test_pictures_are_those_of_diffusers(images: list[Any]) -> None:
    given = {"feature_extractor": DPTImageProcessorPil(**PROCESSOR)}
    expected = listened("StableDiffusionDepth2ImgPipeline", checkpoint(), (3, 4), given, image=images, **CALL)
    latents, pixels = worst(ours(opened(), (3, 4), image=images, **CALL), expected)
    assert latents <= LATENT_BOUND
    assert pixels <= IMAGE_BOUND
    flat = ours(opened(), (3, 4), image=images, depth_map=np.indices((9, 9), np.float32)[:1], **CALL)
    assert worst(flat, expected)[0] > 100 * LATENT_BOUND


def test_an_array_has_the_depth_of_its_picture() -> None:
    image = picture(16, 20)
    array = np.asarray(image, np.float32) / 255
    first, second = (opened().job("a cat", image=one, seed=0).sources.depth for one in (image, array))
    assert np.array_equal(first, second)
    assert first.shape == (1, 1, 8, 10)
    with pytest.raises(InputError, match="image holds latents, whose depth cannot be estimated; give depth_map"):
        opened().job("a cat", image=torch.zeros(1, 4, 8, 10), seed=0)


def test_where_parts_are_exported_the_estimator_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(checkpoint(), "onnxruntime")
    assert not (folder / "depth_estimator").exists()
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(InputError, match="image without depth_map; this task starts from image and depth_map"):
        pipe("a cat", image=picture(16, 20))
    monkeypatch.setenv("ANAMORPH_CACHE", str(tmp_path))
    monkeypatch.setattr("anamorph.pipelines.loading.cached_export", lambda *_: pipe.origin)
    mixed: Any = DiffusionPipeline.from_pretrained(checkpoint(), backend="onnxruntime")
    assert str(mixed.placement["depth_estimator"]).startswith("depth_estimator: eager on ")
    assert mixed.placement["depth_estimator"].details == {
        "instead of": "onnxruntime", **noted([ONEDNN] if is_zen() else []),
    }  # fmt: skip
    assert {part for part, placed in mixed.placement.items() if placed.engine == "onnxruntime"} == {
        "unet", "vae_encoder", "vae_decoder", "text_encoder",
    }  # fmt: skip
    call: dict[str, Any] = {**CALL, "image": picture(16, 20), "seed": [1, 2], "output_type": "np"}
    assert np.abs(mixed(**call).images - opened()(**call).images).max() <= IMAGE_BOUND
    with pytest.raises(BackendError, match="depth_estimator cannot be exported for engine onnxruntime"):
        DiffusionPipeline.from_pretrained(checkpoint(), backend={"depth_estimator": "onnxruntime", "default": "eager"})


def test_the_estimator_is_among_what_the_model_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint()), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = (row for row in report["components"] if row["name"] == "depth_estimator")
    assert row["parameters"] == sum(value.numel() for value in reference(HYBRID).parameters())
    assert report["tasks"] == {"depth": "StableDiffusionDepth2ImgPipeline"}


def test_diffusers_reads_what_we_save(tmp_path: Path) -> None:
    opened().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["depth_estimator"] == [
        "transformers", "DPTForDepthEstimation",
    ]  # fmt: skip
    again: Any = DiffusionPipeline.from_pretrained(tmp_path, backend="eager")
    assert np.array_equal(again.job("", image=picture(16, 20)).sources.depth,
                          opened().job("", image=picture(16, 20)).sources.depth)  # fmt: skip
    given = {"feature_extractor": DPTImageProcessorPil(**PROCESSOR)}
    theirs = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path, **given)
    assert type(theirs.depth_estimator) is transformers.DPTForDepthEstimation
    shutil.rmtree(tmp_path / "feature_extractor")
    with pytest.raises(InputError, match="a depth_estimator without a feature_extractor"):
        StableDiffusionDepth2ImgPipeline.from_pretrained(tmp_path, backend="eager", feature_extractor=None)
