"""ControlNets in single files: original names, alone or below a prefix, and diffusers' names."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpoints import noisy
from original_layout import UNET, XL
from safetensors.torch import save_file

from anamorph import ControlNetModel, UNet2DConditionModel
from anamorph.benchmarks.snippets.original import RESIDUAL, State, _collected, prefixed
from anamorph.errors import CheckpointError

HINT = {"conditioning_embedding_out_channels": (8, 8, 16, 24)}


def net(config: dict[str, Any]) -> Any:
    unet = diffusers.UNet2DConditionModel(**config)
    return noisy(diffusers.ControlNetModel.from_unet(unet, load_weights_from_unet=False, **HINT), 3)


def original(model: Any) -> State:
    """diffusers' ControlNet under the names of the code that trained the first ones."""
    reading = model.controlnet_cond_embedding
    homes = {model.conv_in: "input_blocks.0.0", model.time_embedding.linear_1: "time_embed.0",
             model.time_embedding.linear_2: "time_embed.2", model.mid_block.resnets[0]: "middle_block.0",
             model.mid_block.attentions[0]: "middle_block.1", model.mid_block.resnets[1]: "middle_block.2",
             model.controlnet_mid_block: "middle_block_out.0"}  # fmt: skip
    convolutions = [reading.conv_in, *reading.blocks, reading.conv_out]
    homes |= {layer: f"input_hint_block.{2 * index}" for index, layer in enumerate(convolutions)}
    homes |= {layer: f"zero_convs.{index}.0" for index, layer in enumerate(model.controlnet_down_blocks)}
    if model.config.addition_embed_type is not None:
        homes |= {model.add_embedding.linear_1: "label_emb.0.0", model.add_embedding.linear_2: "label_emb.0.2"}
    number = 1
    for block in model.down_blocks:
        for index, resnet in enumerate(block.resnets):
            homes[resnet] = f"input_blocks.{number}.0"
            if getattr(block, "attentions", None) is not None:
                homes[block.attentions[index]] = f"input_blocks.{number}.1"
            number += 1
        for downsampler in block.downsamplers or ():
            homes[downsampler.conv] = f"input_blocks.{number}.0.op"
            number += 1
    return _collected(homes, RESIDUAL)


@pytest.mark.parametrize("config", [UNET, {**UNET, **XL}], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_files_of_the_original_layout_load(prefix: str, config: dict[str, Any], tmp_path: Path) -> None:
    theirs = net(config)
    save_file(prefixed(prefix, original(theirs)), tmp_path / "net.safetensors")
    mine = ControlNetModel.from_single_file(tmp_path / "net.safetensors")
    expected = theirs.state_dict()
    if theirs.config.addition_embed_type is None:  # diffusers reads no others
        theirs.save_pretrained(tmp_path / "net")
        read = diffusers.ControlNetModel.from_single_file(tmp_path / "net.safetensors", config=str(tmp_path / "net"))
        assert all(torch.equal(value, expected[name]) for name, value in read.state_dict().items())
    assert all(torch.equal(value, expected[name]) for name, value in mine.state_dict().items())
    assert all(mine.config[key] == tuple(theirs.config[key]) for key in ("block_out_channels", *HINT))
    with pytest.raises(CheckpointError, match="holds no UNet2DConditionModel"):
        UNet2DConditionModel.from_single_file(tmp_path / "net.safetensors")


def test_files_with_the_names_of_diffusers_load(tmp_path: Path) -> None:
    theirs = net({**UNET, **XL})
    theirs.save_pretrained(tmp_path)
    mine = ControlNetModel.from_single_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in theirs.state_dict().items())
    wanted = ("down_block_types", "block_out_channels", "transformer_layers_per_block", "cross_attention_dim", *HINT)
    assert {key: mine.config[key] for key in wanted} == {key: _tuple(theirs.config[key]) for key in wanted}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def test_what_is_no_controlnet_is_refused(tmp_path: Path) -> None:
    state = original(net(UNET))
    for stray, said in (("lora.up.weight", "which no Stable Diffusion model has"), (None, "it is cut down")):
        damaged = {**state, stray: torch.zeros(1)} if stray else {
            name: value for name, value in state.items() if name != "input_blocks.0.0.weight"
        }  # fmt: skip
        save_file(damaged, tmp_path / "net.safetensors")
        with pytest.raises(CheckpointError, match=said):
            ControlNetModel.from_single_file(tmp_path / "net.safetensors")
