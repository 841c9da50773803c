"""From one pipeline to another over the same components, pipelines chosen by task, and pipelines of strangers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import FORMATS, exported
from PIL import Image

import anamorph
from anamorph import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from anamorph.errors import CheckpointError, ConfigError, InputError

CALL: dict[str, Any] = {"num_inference_steps": 3, "seed": 5, "output_type": "np"}
PICTURE = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8))


def addresses(pipe: DiffusionPipeline) -> set[int]:
    """Where the weights of everything that PyTorch runs lie in memory."""
    return {
        value.data_ptr()
        for loaded in pipe.components.values()
        for program in getattr(loaded, "programs", {}).values()
        for value in program.program.function.__self__.state_dict().values()
    }


@pytest.mark.parametrize("way", ["from_pipe", "components", "positions", "auto", "opened twice"])
def test_another_task_shares_every_weight_and_draws_the_same(sd1: Path, way: str) -> None:
    first = DiffusionPipeline.from_pretrained(sd1, backend="eager")
    before = addresses(first)
    assert before
    if way == "from_pipe":
        second = StableDiffusionImg2ImgPipeline.from_pipe(first)
    elif way == "components":
        second = StableDiffusionImg2ImgPipeline(**first.components)
    elif way == "positions":
        second = StableDiffusionImg2ImgPipeline(*first.components.values())
    elif way == "auto":
        second = AutoPipelineForImage2Image.from_pipe(first)
    else:
        second = StableDiffusionImg2ImgPipeline.from_pretrained(sd1, backend="eager")
    assert type(second) is StableDiffusionImg2ImgPipeline
    assert "vae_encoder" in second.placement
    assert addresses(second) == before
    del first
    expected: Any = StableDiffusionImg2ImgPipeline.from_pretrained(sd1, backend="null")
    assert expected.components["unet"].config == second.components["unet"].config
    assert np.isfinite(second("a cat", PICTURE, **CALL).images).all()


@pytest.mark.parametrize("engine", FORMATS)
def test_engines_open_what_a_further_task_needs(sd1: Path, engine: str) -> None:
    first = StableDiffusionPipeline.from_pretrained(exported(sd1, engine), backend=engine)
    second = StableDiffusionImg2ImgPipeline.from_pipe(first)
    assert second.components["unet"].programs == first.components["unet"].programs
    drawn = second("a cat", PICTURE, **CALL).images
    whole = StableDiffusionImg2ImgPipeline.from_pretrained(exported(sd1, engine), backend=engine)
    assert np.array_equal(drawn, whole("a cat", PICTURE, **CALL).images)


def test_components_and_settings_can_be_replaced_on_the_way(sd1: Path) -> None:
    first = StableDiffusionPipeline.from_pretrained(sd1, backend="null")
    scheduler = anamorph.EulerDiscreteScheduler.from_config(first.scheduler.config)
    second = DiffusionPipeline.from_pipe(first, scheduler=scheduler)
    assert type(second) is StableDiffusionPipeline
    assert second.scheduler is scheduler
    assert first.scheduler is not scheduler
    assert second.tokenizer is first.tokenizer
    with pytest.raises(InputError, match="has no component or argument 'torch_dtype'"):
        DiffusionPipeline.from_pipe(first, torch_dtype="float32")


def test_the_task_chooses_the_class(sd1: Path) -> None:
    kinds = {
        AutoPipelineForText2Image: StableDiffusionPipeline,
        AutoPipelineForImage2Image: StableDiffusionImg2ImgPipeline,
        AutoPipelineForInpainting: StableDiffusionInpaintPipeline,
    }
    for auto, kind in kinds.items():
        opened = auto.from_pretrained(sd1, backend="null")
        assert type(opened) is kind
        for other, target in kinds.items():
            assert type(other.from_pipe(opened)) is target
        with pytest.raises(TypeError, match="chooses a class and is none itself"):
            auto(**opened.components)
    assert not any("Auto" in name for name in DiffusionPipeline.registry)


def test_a_checkpoint_of_another_family_is_refused(sd1: Path, tmp_path: Path) -> None:
    for entry in sd1.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    index = (tmp_path / "model_index.json").read_text()
    (tmp_path / "model_index.json").unlink()
    changed = index.replace('"StableDiffusionPipeline"', '"DDPMPipeline"')
    (tmp_path / "model_index.json").write_text(changed)
    with pytest.raises(ConfigError, match="is a DDPMPipeline, for which there is no pipeline for inpainting"):
        AutoPipelineForInpainting.from_pretrained(tmp_path, backend="null")


CUSTOM = """
from pathlib import Path
from anamorph import StableDiffusionPipeline

Path({marker!r}).touch()

class Twice(StableDiffusionPipeline):
    def double(self, prompt, **options):
        return [self(prompt, **options), self(prompt, **options)]
"""


def test_a_strangers_pipeline_runs_only_when_it_is_trusted(sd1: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "pipeline.py").write_text(CUSTOM.format(marker=str(marker)))
    for name in (tmp_path / "pipeline.py", tmp_path):
        with pytest.raises(InputError, match=r"is code that would run here; .* trust_remote_code=True"):
            DiffusionPipeline.from_pretrained(sd1, backend="null", custom_pipeline=name)
    assert not marker.exists()
    pipe: Any = DiffusionPipeline.from_pretrained(
        sd1, backend="eager", custom_pipeline=tmp_path / "pipeline.py", trust_remote_code=True
    )
    assert marker.exists()
    first, second = pipe.double("a cat", **CALL)
    assert np.array_equal(first.images, second.images)
    DiffusionPipeline.registry.pop("Twice")


def test_custom_pipelines_that_cannot_be_taken(sd1: Path, tmp_path: Path) -> None:
    def opened(name: Any) -> Any:
        return DiffusionPipeline.from_pretrained(sd1, backend="null", custom_pipeline=name, trust_remote_code=True)

    with pytest.raises(InputError, match="'lpw_stable_diffusion' is no local Python file"):
        opened("lpw_stable_diffusion")
    for text, match in (("1 / 0", "cannot be imported: ZeroDivisionError"), ("", "defines none; expected one class")):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(CheckpointError, match=match):
            opened(tmp_path / "mine.py")
