"""Stage "unet": the denoiser, on stored latents and caption states."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizer

from sd_atoms.errors import UserError
from sd_atoms.pocket.manifest import MANIFEST_NAME, WEIGHTS_FOLDER
from sd_atoms.pocket.pretrain.images import Pictures
from sd_atoms.pocket.pretrain.latents import load_latents, prepare_latents
from sd_atoms.pocket.pretrain.loop import TrainingRun, attend_plainly, batch_per_process, mixed_precision
from sd_atoms.pocket.pretrain.stages import UnetSettings
from sd_atoms.pocket.world import PICTURE_PX, caption

NOISE_SCHEDULE = {  # Stable Diffusion's
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def run(work_dir: Path, settings: UnetSettings, state: PartialState) -> dict:
    """Prepares the latents, trains and writes `work_dir`/unet, a UNet2DConditionModel folder of averaged weights."""
    pictures = Pictures(work_dir, "train")
    prepare_latents(work_dir, pictures, state)
    moments = load_latents(work_dir)
    tokenizer = CLIPTokenizer.from_pretrained(work_dir / "tokenizer")
    clip = CLIPModel.from_pretrained(work_dir / "clip").eval().requires_grad_(False).to(state.device)
    vae_config = AutoencoderKL.load_config(work_dir / "vae")
    torch.manual_seed(settings.seed)  # the same start in every process
    unet = build_unet(settings, vae_config, clip.config.text_config.hidden_size)
    first_step = start_at_packaged(unet) if settings.from_packaged else 0
    unet.to(state.device)
    attend_plainly(unet, state.device)
    ema = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,  # a third of the time on a CPU, where the optimiser takes a tenth of a step
    )
    scheduler = DDPMScheduler(**NOISE_SCHEDULE, prediction_type=settings.prediction_type, clip_sample=False)
    weights = timestep_weights(scheduler.alphas_cumprod, settings)
    training = TrainingRun(work_dir / "unet", settings, state, {"model": unet, "ema": ema}, optimizer, first_step)
    batch_size = batch_per_process(settings.batch_size, state)
    for step in training:
        rng, noise_generator = training.random_numbers()
        indices = rng.integers(0, len(moments), batch_size)
        timesteps = torch.from_numpy(rng.integers(0, scheduler.config.num_train_timesteps, batch_size))
        phrasing = random.Random(int(rng.integers(2**32)))
        captions = [caption(pictures.scenes[index], phrasing) for index in indices]  # worded anew each time
        for sample in np.flatnonzero(rng.random(batch_size) < settings.empty_caption_share):
            captions[sample] = ""
        mean, deviation = moments[indices].float().chunk(2, dim=1)
        drawn = mean + deviation * torch.randn(mean.shape, generator=noise_generator)
        clean = drawn * vae_config["scaling_factor"]
        noise = torch.randn(clean.shape, generator=noise_generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        if settings.prediction_type == "v_prediction":
            target = scheduler.get_velocity(clean, noise, timesteps)
        else:
            target = noise
        with mixed_precision(state.device):
            states = caption_states(clip, tokenizer, captions)
            predicted = unet(noisy.to(state.device), timesteps.to(state.device), states).sample
        errors = (predicted.float() - target.to(state.device)).square().mean((1, 2, 3))  # (n,)
        loss = (errors * weights[timesteps].to(state.device)).mean()
        training.update(loss, mse=errors.mean().item())
        update_ema(ema, unet, settings.ema_decay, step + 1)
    if not state.is_main_process:
        return {}
    ema.save_pretrained(work_dir / "unet")
    return {
        "steps": training.step,
        "first_step": first_step,
        "seconds": round(training.used_seconds),
        "epochs": round(training.step * settings.batch_size / len(moments), 2),
    }


def build_unet(settings: UnetSettings, vae_config: dict, text_width: int) -> UNet2DConditionModel:
    """A UNet for these latents and text states, without attention at its coarsest level."""
    attended = len(settings.channels) - 1
    return UNet2DConditionModel(
        sample_size=PICTURE_PX // 2 ** (len(vae_config["block_out_channels"]) - 1),
        in_channels=vae_config["latent_channels"],
        out_channels=vae_config["latent_channels"],
        block_out_channels=settings.channels,
        layers_per_block=settings.layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * attended + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attended,
        cross_attention_dim=text_width,
        attention_head_dim=settings.attention_heads,  # diffusers reads this field as the number of heads
        norm_num_groups=settings.norm_groups,
    )


def start_at_packaged(unet: UNet2DConditionModel) -> int:
    """Puts in the packaged weights; the steps that their manifest counts. Raises UserError where they don't fit."""
    packaged = UNet2DConditionModel.from_pretrained(WEIGHTS_FOLDER / "pocket-sd" / "unet")
    try:
        unet.load_state_dict(packaged.state_dict())
    except RuntimeError:
        raise UserError("from_packaged: the packaged UNet has other sizes than this stage's settings") from None
    manifest = json.loads((WEIGHTS_FOLDER / MANIFEST_NAME).read_text(encoding="utf-8"))
    return manifest["stages"]["unet"]["figures"]["steps"]


@torch.no_grad()
def caption_states(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """(n, tokens, width): what the pipeline feeds to cross-attention, padded to full length as it pads."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return clip.text_model(tokens.to(clip.device)).last_hidden_state


def timestep_weights(alphas_cumprod: torch.Tensor, settings: UnetSettings) -> torch.Tensor:
    """Loss weights for each timestep, which bound what nearly clean latents count by gamma (arXiv 2303.09556).

    The error of epsilon is snr times that of the clean latents and is weighted by min(snr, gamma) / snr; the error of
    v is snr + 1 times it and is weighted by (min(snr, gamma) + 1) / (snr + 1), so that pure noise counts in full.
    """
    offset = 1 if settings.prediction_type == "v_prediction" else 0
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return (snr.clamp(max=settings.min_snr_gamma) + offset) / (snr + offset)


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float, step: int) -> None:
    """Moves the averaged weights towards the model; early steps count more, so that the start is soon forgotten."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), share)
