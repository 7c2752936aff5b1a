"""Stage "unet": the denoiser, on stored latents and caption states."""

import copy
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig

from sd_atoms.pocket.pretrain.latents import CaptionedLatents, prepare_latents
from sd_atoms.pocket.pretrain.loop import TrainingRun, batch_per_process, mixed_precision
from sd_atoms.pocket.pretrain.settings import UnetSettings
from sd_atoms.pocket.world import PICTURE_PX

NOISE_SCHEDULE = {  # Stable Diffusion's
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def run(work_dir: Path, settings: UnetSettings, state: PartialState) -> dict:
    """Prepares the latents, trains and writes `work_dir`/unet, a UNet2DConditionModel folder of averaged weights."""
    prepare_latents(work_dir, settings, state)
    latents = CaptionedLatents(work_dir)
    vae_config = AutoencoderKL.load_config(work_dir / "vae")
    text_width = CLIPTextConfig.from_pretrained(work_dir / "clip").hidden_size
    torch.manual_seed(settings.seed)  # the same start in every process
    unet = build_unet(settings, vae_config, text_width).to(state.device)
    ema = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    scheduler = DDPMScheduler(**NOISE_SCHEDULE, clip_sample=False)
    timestep_weights = min_snr_weights(scheduler.alphas_cumprod, settings.min_snr_gamma)
    training = TrainingRun(work_dir / "unet", settings, state, {"model": unet, "ema": ema}, optimizer)
    batch_size = batch_per_process(settings.batch_size, state)
    for step in training:
        rng, noise_generator = training.random_numbers()
        indices = rng.integers(0, len(latents), batch_size)
        choices = rng.integers(0, latents.captions_per_picture, batch_size)
        timesteps = torch.from_numpy(rng.integers(0, scheduler.config.num_train_timesteps, batch_size))
        without_caption = torch.from_numpy(rng.random(batch_size) < settings.empty_caption_share)
        mean, deviation, states = latents.batch(indices, choices)
        states[without_caption] = latents.empty_states
        drawn = mean + deviation * torch.randn(mean.shape, generator=noise_generator)
        clean = drawn * vae_config["scaling_factor"]
        noise = torch.randn(clean.shape, generator=noise_generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with mixed_precision(state.device):
            predicted = unet(noisy.to(state.device), timesteps.to(state.device), states.to(state.device)).sample
        errors = (predicted.float() - noise.to(state.device)).square().mean((1, 2, 3))  # (n,)
        loss = (errors * timestep_weights[timesteps].to(state.device)).mean()
        training.update(loss, mse=errors.mean().item())
        update_ema(ema, unet, settings.ema_decay, step + 1)
    if not state.is_main_process:
        return {}
    ema.save_pretrained(work_dir / "unet")
    return {
        "steps": training.step,
        "seconds": round(training.used_seconds),
        "epochs": round(training.step * settings.batch_size / len(latents), 2),
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


def min_snr_weights(alphas_cumprod: torch.Tensor, gamma: float) -> torch.Tensor:
    """Loss weights min(snr, gamma) / snr for each timestep (arXiv 2303.09556)."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float, step: int) -> None:
    """Moves the averaged weights towards the model; early steps count more, so that the start is soon forgotten."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), share)
