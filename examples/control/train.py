"""Train a ControlNet that follows edges for the bundled model.

    python examples/control/train.py [--work FOLDER] [--out FOLDER]

It begins as a copy of the bundled UNet's way down, which itself stays as it is. The pictures are those of
`examples/emoji` at 64 pixels; what it follows are their edges. The loss is that of v-prediction on cached latents, with
half of the captions left out, so that edges have to tell what is there. Seeded; an interrupted run goes on from its
last checkpoint. Source: Zhang et al. 2023 (arXiv:2302.05543), sections 3.2 and 3.3.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "emoji"))

import pictures  # noqa: E402
from autoencoder import encode_all, one_cycle  # noqa: E402
from autoencoder import pictures as read  # noqa: E402
from denoiser import alphas  # noqa: E402
from run import Average, Log, load_checkpoint, save_checkpoint  # noqa: E402

from anamorph import AutoencoderKL, ControlNetModel, DiffusionPipeline, UNet2DConditionModel  # noqa: E402
from anamorph.checkpoint import BUNDLED  # noqa: E402
from anamorph.control_images import canny  # noqa: E402

STEPS, PEAK_RATE, BATCH = 1500, 4e-4, 32
SIDE = 64  # pixels of a picture
CHANNELS = (16, 32, 64)  # of the encoder of edges, which halves them twice, as the autoencoder does
THRESHOLDS = (100, 200)
DROPOUT = 0.5  # share of empty captions
COPIES = 8  # of each picture, all but the first one moved


def moved(x: Tensor) -> Tensor:
    """Each picture turned, mirrored, made smaller and shifted at random, on white.

    The UNet knows its pictures by heart: where they stand as it knows them, edges would tell it nothing new.
    """
    n = len(x)
    angle, scale = 2 * torch.pi * torch.rand(n), 1 + torch.rand(n)
    mirror = (torch.rand(n) < 0.5).float() * 2 - 1
    rows = (mirror * angle.cos(), -angle.sin()), (mirror * angle.sin(), angle.cos())
    turned = torch.stack([torch.stack(row, -1) for row in rows], 1) * scale[:, None, None]
    theta = torch.cat([turned, 0.3 * (2 * torch.rand(n, 2, 1) - 1)], -1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x - 1, grid, align_corners=False) + 1  # outside is white (1), not grey (0)


def edges(x: Tensor) -> Tensor:
    """Edges of pictures in -1..1, [N, 3, H, W] of 0 and 1."""
    images = ((x.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    drawn = np.stack([np.asarray(canny(image, *THRESHOLDS)) for image in images])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


def texts(captions: list[str]) -> Tensor:
    """Hidden states of the captions, [N, 32, 256]."""
    pipe = DiffusionPipeline.from_pretrained(backend="eager")
    return torch.cat([torch.from_numpy(pipe.encode(captions[i : i + 64])) for i in range(0, len(captions), 64)])


def loss_of(
    net: ControlNetModel, unet: UNet2DConditionModel, z: Tensor, picture: Tensor, states: Tensor, cumulative: Tensor
) -> Tensor:
    """Mean squared error of v = alpha noise - sigma z, timesteps stratified over the batch."""
    n = len(z)
    t = ((torch.arange(n) + torch.rand(n)) / n * len(cumulative)).long()
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in (cumulative[t].sqrt(), (1 - cumulative[t]).sqrt()))
    noise = torch.randn_like(z)
    noisy = alpha * z + sigma * noise
    with torch.autocast("cpu", torch.bfloat16):
        down, mid = net(noisy, t, states, picture, return_dict=False)
        v = unet(noisy, t, states, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    return F.mse_loss(v.float(), alpha * noise - sigma * z)


def train(data: Path, work: Path, out: Path, steps: int) -> None:
    """Train, or go on from the last checkpoint, and save the averaged weights in fp16."""
    torch.manual_seed(0)
    x = read(data)
    x = torch.cat([x, *(moved(x) for _ in range(1, COPIES))])
    vae = AutoencoderKL.from_pretrained(BUNDLED, subfolder="vae")
    latents, drawn = encode_all(vae, x) * vae.config.scaling_factor, edges(x)
    captions = [str(names).split("|")[0] for names in np.load(data)["captions"]]
    states = texts([*captions, ""])
    unet = UNet2DConditionModel.from_pretrained(BUNDLED, subfolder="unet").requires_grad_(False)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CHANNELS)
    net, unet = (model.to(memory_format=torch.channels_last) for model in (net, unet))
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    average, log, cumulative = Average(net, 0.995), Log(work / "control.csv", "step,seconds,loss"), alphas()
    for step in range(load_checkpoint(work / "control.pt", net, average, optimizer, log), steps):
        optimizer.param_groups[0]["lr"] = one_cycle(step, steps, PEAK_RATE, 100)
        chosen = torch.randint(len(x), (BATCH,))
        words = torch.where(torch.rand(BATCH) < DROPOUT, len(captions), chosen % len(captions))
        loss = loss_of(net, unet, latents[chosen], drawn[chosen], states[words], cumulative)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update(net, step)
        log.add(step, loss.item())
        if (step + 1) % 50 == 0:
            save_checkpoint(work / "control.pt", step + 1, net, average, optimizer, log)
    net.load_state_dict(average.state)
    net.half().save_pretrained(out)


def main() -> None:
    """Render the pictures where they are missing, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="pictures, checkpoints and logs")
    parser.add_argument("--out", type=Path, default=HERE / "controlnet", help="the trained ControlNet")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the optimiser (default: %(default)s)")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / f"emoji{SIDE}.npz"
    if not data.exists():
        pictures.render(data, SIDE)
    train(data, options.work, options.out, options.steps)


if __name__ == "__main__":
    main()
