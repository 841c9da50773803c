"""Models that pipelines of today reach seldom, exported whole and compared with PyTorch on both engines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import UNET, noisy
from exported import FORMATS, opened, trace_once
from test_models_autoencoders import TINY, VQ
from test_models_pictures import BERT, VISION
from test_models_unconditional import SKIP, VARIANTS
from test_models_unconditional import UNET as PLAIN
from test_models_unet import UPSCALER

from anamorph.backends.eager import Eager
from anamorph.components import Component
from anamorph.config import Config
from anamorph.engine import Target
from anamorph.errors import InputError
from anamorph.exporters.trace import part_interface
from anamorph.exporting import ExportOptions
from anamorph.guard import open_parts
from anamorph.models import MODELS
from anamorph.probes import probe, probe_sizes

BOUND = 1e-5
"""Largest difference from PyTorch in float64, in units of its largest value: two roundings would be judged as one."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": (
        "UNet2DModel",
        {**PLAIN, **VARIANTS["ddpm"][0], "time_embedding_type": "learned", "num_train_timesteps": 1000},
    ),
    "unet of classes": (
        "UNet2DModel",
        {**PLAIN, **VARIANTS["residual changes"][0], "num_class_embeds": 20, "resnet_time_scale_shift": "scale_shift"},
    ),
    "ncsnpp": ("UNet2DModel", {**PLAIN, **SKIP, "block_out_channels": (32, 64)} | {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "layers_per_block": 1}),
    "upscaler by four": ("UNet2DConditionModel", {**UNET, "num_class_embeds": 20, "in_channels": 7}),
    "upscaler by two": ("UNet2DConditionModel", {
        **UPSCALER, "block_out_channels": (32, 64, 64), "cross_attention_dim": 32,
        "down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("KCrossAttnUpBlock2D",) * 2, "KUpBlock2D")}),
    "tiny autoencoder": ("AutoencoderTiny", TINY),
    "autoencoder of a codebook": ("VQModel", {**VQ, "vq_embed_dim": 5}),
    "picture encoder": ("CLIPVisionModelWithProjection", VISION),
    "safety checker": ("StableDiffusionSafetyChecker", {"projection_dim": 24, "vision_config": VISION}),
    "bert": ("LDMBertModel", BERT),
}  # fmt: skip


def component(name: str, config: Config) -> Component:
    """A component that is called as its model calls its first part."""
    return Component(next(iter(MODELS[name].PARTS)), name, config)


@pytest.mark.parametrize("engine", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_a_model_equals_pytorch_at_every_size(case: str, engine: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    model: Any = noisy(MODELS[name](**config), 7)
    precise: Any = noisy(MODELS[name](**config), 7).double()
    described = component(name, model.config)
    for part, method in model.PARTS.items():
        interface = part_interface(described, part, ExportOptions(), 1)
        session = opened(engine, tmp_path / part, trace_once(model, method, interface), interface)
        for sizes in probe_sizes(interface):
            inputs = probe(interface, sizes)
            doubled = [torch.from_numpy(v.astype(np.float64) if v.dtype == np.float32 else v) for v in inputs.values()]
            with torch.inference_mode():
                expected = getattr(precise, method)(*doubled)
            outputs = session(inputs)
            assert list(outputs) == [port.name for port in interface.outputs]
            for value, reference in zip(outputs.values(), expected, strict=True):
                exact = reference.numpy()
                assert value.shape == exact.shape
                assert exact.std() > 0
                assert np.abs(value - exact).max() <= BOUND * np.abs(exact).max()


@pytest.mark.parametrize("engine", ["eager", *FORMATS])
def test_a_number_outside_its_range_never_reaches_an_engine(engine: str, tmp_path: Path) -> None:
    model = noisy(MODELS["LDMBertModel"](**BERT), 7)
    interface = component("LDMBertModel", model.config).interface("text_encoder")
    put: Any = torch.from_numpy if engine == "eager" else np.asarray
    if engine == "eager":
        described = Component("text_encoder", "LDMBertModel", model.config, module=model)
        session = open_parts(Eager(), described, ["text_encoder"], Target())["text_encoder"].session()
    else:
        session = opened(engine, tmp_path, trace_once(model, "states", interface), interface)
    with pytest.raises(InputError, match="input_ids holds 50, expected 0 to 49"):
        session({"input_ids": put(np.array([[3, 50]]))})
    with pytest.raises(InputError, match="input_ids holds -1"):
        session({"input_ids": put(np.array([[3, -1]]))})
