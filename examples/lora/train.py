"""Train an adapter (LoRA) for the bundled model: its pictures become pencil drawings.

    python examples/lora/train.py [--work FOLDER] [--out FILE]

The pictures are those of `examples/emoji`, drawn in pencil by a filter; the captions stay. Only the factors are
trained, beside all attention and feed-forward layers of the UNet, whose own weights do not change. Seeded; an
interrupted run goes on from its last checkpoint. Source: Hu et al. 2021 (arXiv:2106.09685).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "emoji"))

import pictures  # noqa: E402
from autoencoder import encode_all, one_cycle  # noqa: E402
from autoencoder import pictures as read  # noqa: E402
from denoiser import alphas  # noqa: E402
from run import Average, Log, load_checkpoint, save_checkpoint  # noqa: E402

from anamorph import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from anamorph.checkpoint import BUNDLED  # noqa: E402

RANK, STEPS, PEAK_RATE, BATCH = 8, 700, 2e-3, 32
CHANGED = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""Ends of the names of attention and feed-forward layers."""
DROPOUT = 0.1  # share of empty captions
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


class Branch(nn.Module):
    """y + (x down) up beside a linear layer; `up` begins at zero, so that nothing changes at first."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, layer.in_features) / RANK)
        self.up = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A hook behind the layer."""
        del layer
        return output + F.linear(F.linear(given[0], self.down), self.up)


def branches(unet: nn.Module) -> dict[str, Branch]:
    """A branch beside each layer that is changed."""
    found = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(CHANGED):
            found[name] = Branch(layer)
            layer.register_forward_hook(found[name])
    return found


def pencil(x: Tensor) -> Tensor:
    """Pictures in -1..1 as pencil drawings: brightness divided by its own blur, so that edges and shades remain."""
    grey = ((x + 1) / 2 * torch.tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    reach = torch.arange(-6, 7).float()
    weights = torch.exp(-(reach**2) / 8)
    kernel = (weights[:, None] * weights)[None, None] / weights.sum() ** 2
    blurred = F.conv2d(F.pad(grey, (6, 6, 6, 6), mode="replicate"), kernel)
    lines = ((grey + 0.02) / (blurred + 0.02)).clamp(0, 1) ** 2
    shade = 0.75 + 0.25 * grey
    return ((lines * shade) * 2 - 1).expand(-1, 3, -1, -1)


def loss_of(unet: nn.Module, z: Tensor, states: Tensor, cumulative: Tensor) -> Tensor:
    """Mean squared error of v = alpha noise - sigma z, timesteps stratified over the batch."""
    n = len(z)
    t = ((torch.arange(n) + torch.rand(n)) / n * len(cumulative)).long()
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in (cumulative[t].sqrt(), (1 - cumulative[t]).sqrt()))
    noise = torch.randn_like(z)
    v = unet(alpha * z + sigma * noise, t, encoder_hidden_states=states).sample
    return F.mse_loss(v, alpha * noise - sigma * z)


def train(data: Path, work: Path, out: Path) -> None:
    """Train, or go on from the last checkpoint, and save the averaged factors in fp16."""
    torch.manual_seed(0)
    pipe = DiffusionPipeline.from_pretrained(backend="eager")
    vae = AutoencoderKL.from_pretrained(BUNDLED / "vae").eval()
    latents = encode_all(vae, pencil(read(data))) * vae.config.scaling_factor
    captions = [*(str(names).split("|")[0] for names in np.load(data)["captions"]), ""]
    states = torch.cat([torch.from_numpy(pipe.encode(captions[i : i + 64])) for i in range(0, len(captions), 64)])
    unet = UNet2DConditionModel.from_pretrained(BUNDLED / "unet").requires_grad_(False)
    trained = branches(unet)
    factors = nn.ModuleList(trained.values())
    optimizer = torch.optim.AdamW(factors.parameters(), lr=PEAK_RATE, weight_decay=1e-3, betas=(0.9, 0.99))
    average, log, cumulative = Average(factors, 0.99), Log(work / "pencil.csv", "step,seconds,loss"), alphas()
    for step in range(load_checkpoint(work / "pencil.pt", factors, average, optimizer, log), STEPS):
        optimizer.param_groups[0]["lr"] = one_cycle(step, STEPS, PEAK_RATE, 30)
        chosen = torch.randint(len(latents), (BATCH,))
        words = torch.where(torch.rand(BATCH) < DROPOUT, len(captions) - 1, chosen)
        loss = loss_of(unet, latents[chosen], states[words], cumulative)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(factors.parameters(), 1.0)
        optimizer.step()
        average.update(factors, step)
        log.add(step, loss.item())
        if (step + 1) % 50 == 0:
            save_checkpoint(work / "pencil.pt", step + 1, factors, average, optimizer, log)
    factors.load_state_dict(average.state)
    layers = {
        f"{name}.lora_{end}.weight": factor.detach().half().numpy()
        for name, branch in trained.items()
        for end, factor in (("A", branch.down), ("B", branch.up))
    }
    StableDiffusionPipeline.save_lora_weights(out.parent, unet_lora_layers=layers, weight_name=out.name)


def main() -> None:
    """Render the pictures where they are missing, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="pictures, checkpoints and logs")
    parser.add_argument("--out", type=Path, default=HERE / "pencil.safetensors", help="the trained adapter")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / "emoji64.npz"
    if not data.exists():
        pictures.render(data)
    train(data, options.work, options.out)


if __name__ == "__main__":
    main()
