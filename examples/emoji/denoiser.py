"""Train the text encoder and the denoiser together: v-prediction on cached latents, 10 % caption dropout, EMA."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import encode_all, one_cycle, pictures
from run import Average, Log, load_checkpoint, save_checkpoint
from torch import Tensor, nn
from vocabulary import LENGTH

from anamorph import AutoencoderKL, CLIPTextModel, ClipTokenizer, UNet2DConditionModel

TEXT = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
}
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (80, 160, 224),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 256,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
CYCLES = ((3200, 1e-3), (2800, 7e-4))  # steps and peak learning rate
BATCH = 64
YOUNG = 0.2
LIGHT = 0.15  # sampling weight of pictures whose caption begins or ends with one of these words, and of flags
LIGHT_FIRST = {
    "man",
    "men",
    "woman",
    "women",
    "family",
    "kiss",
    "couple",
    "japanese",
    "keycap",
    "person",
    "people",
    "clock",
}
LIGHT_LAST = {"button", "thirty", "o\u2019clock", "arrow", "square", "cushion", "sign"}
NOISY = 0.65  # timesteps are 1000 u^NOISY with u uniform: what a caption decides is decided at high noise
DROPOUT = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
ALIAS = 0.15  # share of captions taken from an emoji's other names


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, so that one optimiser and one average cover both."""

    def __init__(self, vocab_size: int, end: int) -> None:
        super().__init__()
        self.text = CLIPTextModel(vocab_size=vocab_size, bos_token_id=end - 1, eos_token_id=end, **TEXT)
        self.unet = UNet2DConditionModel(**UNET)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        states = self.text(ids).last_hidden_state
        return self.unet(x, t, encoder_hidden_states=states).sample


def weights(captions: list[list[str]], ages: Tensor) -> Tensor:
    """Sampling weights: flags, signs and near-copies (a man, a woman and a person doing the same) count less.

    So do emoji that came after version 1 of the standard, which fewer people know.
    """
    light = torch.tensor([is_light(names) for names in captions])
    return torch.where(light, LIGHT, 1.0) * torch.where(ages > 1, YOUNG, 1.0)


def rate(step: int) -> float:
    """Learning rate: one cycle after the other."""
    for steps, peak in CYCLES:
        if step < steps:
            return one_cycle(step, steps, peak, 200)
        step -= steps
    raise ValueError(f"step {step} lies after the last cycle")


def is_light(names: list[str]) -> bool:
    """Whether a picture is one of many of its kind; `names` are its captions, the main one first."""
    first, last = names[0].split()[0].rstrip(":"), names[0].split()[-1]
    flag = len(names) > 1 and names[1].startswith("flag for")
    return flag or first in LIGHT_FIRST or last in LIGHT_LAST


def alphas() -> Tensor:
    """Cumulative products of Stable Diffusion's scaled-linear schedule, [1000]."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def caption_ids(captions: list[list[str]], chosen: Tensor, tokenizer: ClipTokenizer) -> Tensor:
    """Token ids [N, LENGTH] of one name per picture, some aliases, some empty."""
    texts = []
    for index in chosen.tolist():
        main, *others = captions[index]
        roll = torch.rand(()).item()
        alias = others[int(torch.randint(len(others), ()))] if others and roll < ALIAS else main
        texts.append("" if roll > 1 - DROPOUT else alias)
    return torch.from_numpy(tokenizer(texts).input_ids)


def v_loss(model: nn.Module, z: Tensor, ids: Tensor, cumulative: Tensor) -> Tensor:
    """Mean squared error of v = alpha noise - sigma z (Salimans & Ho 2022), timesteps stratified over the batch."""
    n = len(z)
    t = (((torch.arange(n) + torch.rand(n)) / n) ** NOISY * len(cumulative)).long()
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in (cumulative[t].sqrt(), (1 - cumulative[t]).sqrt()))
    noise = torch.randn_like(z)
    with torch.autocast("cpu", torch.bfloat16):
        v = model(alpha * z + sigma * noise, t, ids)
    return F.mse_loss(v.float(), alpha * noise - sigma * z)


def load_weights(model: Denoiser, folder: Path) -> None:
    """The weights of a finished checkpoint folder."""
    model.text.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict())
    model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())


def train(data: Path, work: Path, start: Path | None) -> None:
    """Train (or go on from the last checkpoint) and save `work/unet` and `work/text_encoder`.

    From the weights of a finished checkpoint, `start`, the first cycle is left out.
    """
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    latents = encode_all(vae, pictures(data)) * vae.config.scaling_factor
    captions = [str(names).split("|") for names in np.load(data)["captions"]]
    share = weights(captions, torch.from_numpy(np.load(data)["ages"]))
    tokenizer = ClipTokenizer.from_pretrained(work / "tokenizer")
    model = Denoiser(tokenizer.vocab_size, tokenizer.eos_token_id).to(memory_format=torch.channels_last)
    if start:
        load_weights(model, start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CYCLES[0][1], weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    average = Average(model, 0.998)
    log = Log(work / "denoiser.csv", "step,seconds,loss")
    cumulative = alphas()
    steps = sum(length for length, _ in CYCLES)
    done = load_checkpoint(work / "denoiser.pt", model, average, optimizer, log)
    for step in range(done or (CYCLES[0][0] if start else 0), steps):
        optimizer.param_groups[0]["lr"] = rate(step)
        chosen = torch.multinomial(share, BATCH, replacement=False)
        ids = caption_ids(captions, chosen, tokenizer)
        loss = v_loss(model, latents[chosen], ids, cumulative)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        log.add(step, loss.item())
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_checkpoint(work / "denoiser.pt", step + 1, model, average, optimizer, log)
    model.load_state_dict(average.state)
    model.unet.save_pretrained(work / "unet")
    model.text.save_pretrained(work / "text_encoder")
