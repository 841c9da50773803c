"""Pictures as prompts on exported graphs: one UNet serves with and without them."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from exported import FORMATS, exported, once, shared_place
from ip_adapters import VISION, image_encoder
from parity import Agrees, Trace, ours, worst
from pictures import picture
from test_ip_adapter import BLOCKS, CALL, LOOK, NAMES, SIZE, folder, halves

from anamorph import CLIPImageProcessor, DiffusionPipeline
from anamorph.artifact import NATIVE, read_artifact
from anamorph.errors import InputError

CALLS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "base": (NAMES["base"], 0.8, {"ip_adapter_image": LOOK}),
    "full": (NAMES["full"], BLOCKS, {"ip_adapter_image": LOOK, "num_images_per_prompt": 2}),
    "several": (
        [NAMES["plus"], NAMES["base"]], [0.5, 0.7],
        {"ip_adapter_image": [[LOOK, picture(30, 16, 1)], LOOK]},
    ),
    "masks": (
        [NAMES["plus"], NAMES["base"]], [[0.9, 0.3], 0.7],
        {"ip_adapter_image": [[LOOK, picture(30, 16, 1)], LOOK],
         "cross_attention_kwargs": {"ip_adapter_masks": [halves().reshape(1, 2, 64, 32), None]}},
    ),
    "unguided": (NAMES["base"], 1.0, {"ip_adapter_image": LOOK, "guidance_scale": 1.0}),
}  # fmt: skip
"""Adapters, scales, and what a call looks at."""


@functools.cache
def pipeline(checkpoint: Path, engine: str) -> Any:
    return DiffusionPipeline.from_pretrained(exported(checkpoint, engine, NATIVE), backend=engine)


def drawn(checkpoint: Path, engine: str, case: str, **size: int) -> Trace:
    """What an engine draws."""
    pipe, (names, scale, call) = pipeline(checkpoint, engine), CALLS[case]
    pipe.load_ip_adapter(folder(checkpoint), subfolder="models", weight_name=names)
    pipe.set_ip_adapter_scale(scale)
    found = ours(pipe, 3, **{**CALL, **call, **size})
    pipe.unload_ip_adapter()
    return found


def plain(checkpoint: Path, engine: str, **size: int) -> Trace:
    return ours(pipeline(checkpoint, engine), 3, **{**CALL, **size})


@pytest.mark.parametrize("engine", FORMATS)
def test_one_graph_serves_with_and_without_pictures(sd1: Path, engine: str, agrees: Agrees) -> None:
    before = plain(sd1, engine, **SIZE)
    agrees("without IP-Adapter, SD1", worst(before, plain(sd1, "eager", **SIZE)), engine)
    for case in CALLS:
        found = worst(drawn(sd1, engine, case, **SIZE), drawn(sd1, "eager", case, **SIZE))
        agrees(f"IP-Adapter {case}, SD1", found, engine)
    assert worst(drawn(sd1, engine, "base", **SIZE), before)[0] > 1e-2
    assert worst(plain(sd1, engine, **SIZE), before) == (0, 0)  # nothing of the last call is left
    parts = read_artifact(exported(sd1, engine, NATIVE)).parts
    assert [name for name in parts if name.startswith("unet")] == ["unet", "unet_prepare"]


def seeing(sdxl: Path) -> Path:
    """A checkpoint that has a picture encoder of its own."""

    def make(place: Path) -> None:
        shutil.copytree(sdxl, place)
        image_encoder(place / "image_encoder")
        side = VISION["image_size"]
        CLIPImageProcessor(size=side, crop_size=side).save_pretrained(place / "feature_extractor")
        index = json.loads((place / "model_index.json").read_text())
        index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        (place / "model_index.json").write_text(json.dumps(index))

    return once(shared_place() / "sdxl-seeing", make)


def test_a_picture_encoder_of_the_checkpoint_is_exported_with_it(sdxl: Path, agrees: Agrees) -> None:
    checkpoint, size, engine = seeing(sdxl), {"height": 16, "width": 32}, "openvino"
    for case in ("base", "several"):
        found = worst(drawn(checkpoint, engine, case, **size), drawn(checkpoint, "eager", case, **size))
        agrees(f"IP-Adapter {case}, SDXL", found, engine)
        assert pipeline(checkpoint, engine).image_encoder is None  # it leaves with the adapter, as in diffusers
        pipeline.cache_clear()


@pytest.mark.parametrize("engine", FORMATS)
def test_the_picture_encoder_runs_on_the_engine_and_leaves_with_the_adapter(sd1: Path, engine: str) -> None:
    pipe = pipeline(sd1, engine)
    pipe.load_ip_adapter(folder(sd1), subfolder="models", weight_name=NAMES["base"])
    assert pipe.placement["image_encoder"].engine == engine
    pipe.unload_ip_adapter()
    assert "image_encoder" not in pipe.placement


def test_a_portable_export_has_no_place_for_pictures(sd2: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(exported(sd2, "onnxruntime"))
    with pytest.raises(InputError, match="no inputs for pictures as prompts; export the checkpoint with the"):
        pipe.load_ip_adapter(folder(sd2), subfolder="models", weight_name=NAMES["base"])
    assert "image_encoder" not in pipe.placement
