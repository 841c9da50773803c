"""Train an upscaler by four for the bundled model: its UNet sees the small picture, noised, as three further channels.

    python examples/upscaling/train.py [--work FOLDER] [--out FOLDER]

The pictures are those of `examples/emoji`, at 128 pixels and, small, at 32. The loss is that of v-prediction on random
windows of cached latents; autoencoder and text encoder are the bundled ones. Seeded; an interrupted run goes on from
its last checkpoint. Source: Ho et al. 2021 (arXiv:2106.15282), noise as conditioning augmentation.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "emoji"))

import pictures  # noqa: E402
from assemble import SCALE, autoencoder  # noqa: E402
from autoencoder import encode_all, one_cycle  # noqa: E402
from autoencoder import pictures as read  # noqa: E402
from denoiser import alphas  # noqa: E402
from run import Average, Log, load_checkpoint, save_checkpoint  # noqa: E402

from anamorph import DiffusionPipeline, UNet2DConditionModel  # noqa: E402

UNET = {
    "sample_size": 32,
    "in_channels": 7,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (48, 96, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 256,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "num_class_embeds": 1000,
}
STEPS, PEAK_RATE, BATCH = 2400, 2e-3, 24
SIDE = 128  # pixels of a picture; the small one has a quarter
WINDOW = 16  # latents of a side that one sample sees
LEVELS = 200  # the small picture is noised up to this timestep
DROPOUT = 0.1  # share of empty captions


def small(x: Tensor) -> Tensor:
    """Pictures a quarter as large."""
    return F.interpolate(x, scale_factor=0.25, mode="bicubic", antialias=True).clamp(-1, 1)


def texts(captions: list[str]) -> Tensor:
    """Hidden states of the captions and, last, of the empty one, [N + 1, 32, 256]."""
    pipe = DiffusionPipeline.from_pretrained(backend="eager")
    return torch.cat([torch.from_numpy(pipe.encode(captions[i : i + 64])) for i in range(0, len(captions), 64)])


def window(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same random window of latents and small pictures."""
    top, left = torch.randint(z.shape[-1] - WINDOW + 1, (2,)).tolist()
    cut = (..., slice(top, top + WINDOW), slice(left, left + WINDOW))
    return z[cut], x[cut]


def loss_of(unet: UNet2DConditionModel, z: Tensor, x: Tensor, states: Tensor, cumulative: Tensor) -> Tensor:
    """Mean squared error of v = alpha noise - sigma z, timesteps stratified over the batch."""
    n = len(z)
    t = ((torch.arange(n) + torch.rand(n)) / n * len(cumulative)).long()
    level = torch.randint(LEVELS, (n,))
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in (cumulative[t].sqrt(), (1 - cumulative[t]).sqrt()))
    noise, grain = torch.randn_like(z), torch.randn_like(x)
    kept = cumulative[level].view(-1, 1, 1, 1)
    given = torch.cat([alpha * z + sigma * noise, kept.sqrt() * x + (1 - kept).sqrt() * grain], 1)
    with torch.autocast("cpu", torch.bfloat16):
        v = unet(given, t, encoder_hidden_states=states, class_labels=level).sample
    return F.mse_loss(v.float(), alpha * noise - sigma * z)


def train(data: Path, work: Path, out: Path) -> None:
    """Train, or go on from the last checkpoint, and save the averaged weights in fp16."""
    import numpy as np

    torch.manual_seed(0)
    x = read(data)
    latents, inputs = encode_all(autoencoder(), x) * SCALE, small(x)
    captions = [str(names).split("|")[0] for names in np.load(data)["captions"]]
    states = texts([*captions, ""])
    unet = UNet2DConditionModel(**UNET).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=PEAK_RATE, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    average, log, cumulative = Average(unet, 0.998), Log(work / "upscaler.csv", "step,seconds,loss"), alphas()
    for step in range(load_checkpoint(work / "upscaler.pt", unet, average, optimizer, log), STEPS):
        optimizer.param_groups[0]["lr"] = one_cycle(step, STEPS, PEAK_RATE, 100)
        chosen = torch.randint(len(x), (BATCH,))
        z, y = window(latents[chosen], inputs[chosen])
        words = torch.where(torch.rand(BATCH) < DROPOUT, len(captions), chosen)
        loss = loss_of(unet, z, y, states[words], cumulative)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update(unet, step)
        log.add(step, loss.item())
        if (step + 1) % 100 == 0:
            save_checkpoint(work / "upscaler.pt", step + 1, unet, average, optimizer, log)
    unet.load_state_dict(average.state)
    unet.half().save_pretrained(out)


def main() -> None:
    """Render the pictures where they are missing, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="pictures, checkpoints and logs")
    parser.add_argument("--out", type=Path, default=HERE / "unet", help="the trained UNet")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / f"emoji{SIDE}.npz"
    if not data.exists():
        pictures.render(data, SIDE)
    train(data, options.work, options.out)


if __name__ == "__main__":
    main()
