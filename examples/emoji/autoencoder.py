"""Train the autoencoder: 64x64x3 pictures to 16x16x4 latents, L1 + MSE + gradient loss + 1e-3 KL."""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from run import Average, Log, load_checkpoint, save_checkpoint
from torch import Tensor

from anamorph import AutoencoderKL

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 64,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
}
PEAK_RATE = 2e-3
BATCH = 16


def pictures(path: Path) -> Tensor:
    """The training set in -1..1, fp32 [N, 3, H, W]."""
    return torch.from_numpy(np.load(path)["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(x: Tensor) -> Tensor:
    """Small random scale, shift and mirror per picture, and now and then permuted colour channels."""
    n = len(x)
    theta = torch.zeros(n, 2, 3)
    scale = 1 + 0.15 * (2 * torch.rand(n) - 1)
    theta[:, 0, 0] = scale * ((torch.rand(n) < 0.5).float() * 2 - 1)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = 0.1 * (2 * torch.rand(n, 2) - 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x - 1, grid, align_corners=False) + 1  # outside is white (1), not grey (0)
    return moved[:, torch.randperm(3)] if torch.rand(()) < 0.25 else moved


def loss_of(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, float]:
    """The training loss of one batch and its L1 part."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
    y = y.float()
    l1 = (y - x).abs().mean()
    edges = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return l1 + F.mse_loss(y, x) + 0.5 * edges + 1e-3 * kl, l1.item()


def one_cycle(step: int, steps: int, peak: float, warm: int) -> float:
    """Linear warm-up, then half a cosine down to 1 % of the peak."""
    return peak * min(1.0, (step + 1) / warm) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)


def encode_all(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Posterior means of all pictures, [N, 4, 16, 16]."""
    with torch.no_grad():
        return torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])


def train(data: Path, work: Path, steps: int) -> None:
    """Train (or go on from the last checkpoint) and save `work/vae` in diffusers' layout."""
    torch.manual_seed(0)
    x = pictures(data)
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, weight_decay=1e-4, betas=(0.9, 0.99))
    average = Average(vae, 0.999)
    log = Log(work / "autoencoder.csv", "step,seconds,loss,l1")
    start = load_checkpoint(work / "autoencoder.pt", vae, average, optimizer, log)
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = one_cycle(step, steps, PEAK_RATE, 100)
        batch = augment(x[torch.randint(len(x), (BATCH,))]).contiguous(memory_format=torch.channels_last)
        loss, l1 = loss_of(vae, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae, step)
        log.add(step, loss.item(), l1)
        if (step + 1) % 250 == 0:
            save_checkpoint(work / "autoencoder.pt", step + 1, vae, average, optimizer, log)
    vae.load_state_dict(average.state)
    vae.eval()
    began = time.time()
    z = encode_all(vae, x)
    vae.config = vae.config.replace(scaling_factor=round(1 / z.std().item(), 5))
    with torch.no_grad():
        y = torch.cat([vae.decode(part).sample for part in z.split(64)]).clamp(-1, 1)
    psnr = -10 * torch.log10((y - x).div(2).square().mean()).item()
    print(f"autoencoder: PSNR {psnr:.2f} dB, scaling factor {vae.config.scaling_factor}, {time.time() - began:.0f} s")
    vae.save_pretrained(work / "vae")
