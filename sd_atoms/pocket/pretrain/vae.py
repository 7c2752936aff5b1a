"""Stage "vae": the autoencoder, mostly on crops because they are cheap, at the end on whole pictures."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL

from sd_atoms.pocket.pretrain.images import Pictures, to_unit_range
from sd_atoms.pocket.pretrain.loop import TrainingRun, attend_plainly, batch_per_process, mixed_precision
from sd_atoms.pocket.pretrain.stages import VaeSettings
from sd_atoms.pocket.world import PICTURE_PX

SCALE_PICTURES = 512  # training pictures that the latent scale is measured on
TEST_PICTURES = 64  # held-out pictures that the PSNR is measured on


def run(work_dir: Path, settings: VaeSettings, state: PartialState) -> dict:
    """Trains and writes `work_dir`/vae, an AutoencoderKL folder with the measured latent scale in its config."""
    pictures = Pictures(work_dir, "train")
    torch.manual_seed(settings.seed)  # the same start in every process
    vae = build_vae(settings).to(state.device)
    attend_plainly(vae, state.device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    training = TrainingRun(work_dir / "vae", settings, state, {"model": vae}, optimizer)
    for _ in training:
        rng, noise = training.random_numbers()
        on_crops = training.progress < settings.crop_share
        batch_size = settings.batch_size if on_crops else settings.whole_picture_batch_size
        pixels = pictures.batch(rng.integers(0, len(pictures), batch_per_process(batch_size, state)))
        if on_crops:
            pixels = random_crops(pixels, settings.crop_px, rng)
        target = to_unit_range(pixels).to(state.device)
        with mixed_precision(state.device):
            posterior = vae.encode(target).latent_dist
            output = vae.decode(posterior.sample(noise)).sample
        output = output.float()
        l1, mse, edge = F.l1_loss(output, target), F.mse_loss(output, target), edge_loss(output, target)
        mean, variance, log_variance = posterior.mean.float(), posterior.var.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + variance - 1 - log_variance).mean()
        loss = l1 + mse + settings.edge_weight * edge + settings.kl_weight * kl
        training.update(loss, l1=l1.item(), mse=mse.item(), edge=edge.item(), kl=kl.item())
    if not state.is_main_process:
        return {}
    vae.eval()
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae, pictures))
    vae.save_pretrained(work_dir / "vae")
    psnr = measure_psnr(vae, Pictures(work_dir, "held"))
    return {
        "steps": training.step,
        "seconds": round(training.used_seconds),
        "scaling_factor": vae.config.scaling_factor,
        "held_out_psnr_db": round(psnr, 2),
    }


def build_vae(settings: VaeSettings) -> AutoencoderKL:
    levels = len(settings.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=settings.latent_channels,
        block_out_channels=settings.channels,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=settings.norm_groups,
        sample_size=PICTURE_PX,
    )


def random_crops(pixels: torch.Tensor, side_px: int, rng: np.random.Generator) -> torch.Tensor:
    """(n, 3, 128, 128) -> (n, 3, side, side), each picture cut somewhere else."""
    corners = rng.integers(0, PICTURE_PX - side_px, (len(pixels), 2), endpoint=True)
    crops = [
        picture[:, top : top + side_px, left : left + side_px]
        for picture, (top, left) in zip(pixels, corners, strict=True)
    ]
    return torch.stack(crops)


def edge_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 between the differences of neighbouring pixels, along rows plus along columns."""
    error = output - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


@torch.no_grad()
def measure_scaling_factor(vae: AutoencoderKL, pictures: Pictures) -> float:
    """What brings the latents of training pictures to standard deviation 1."""
    count = min(SCALE_PICTURES, len(pictures))
    means = []
    for first in range(0, count, 32):
        pixels = pictures.batch(range(first, min(count, first + 32)))
        means.append(vae.encode(to_unit_range(pixels).to(vae.device)).latent_dist.mean)
    return float(1 / torch.cat(means).std())


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, pictures: Pictures) -> float:
    """Decibels between held-out pictures and their reconstructions, from the mean squared error over all of them."""
    target = to_unit_range(pictures.batch(range(min(TEST_PICTURES, len(pictures))))).to(vae.device)
    output = vae.decode(vae.encode(target).latent_dist.mean).sample.clamp(-1, 1)
    return -10 * float(torch.log10(F.mse_loss(output, target) / 4))  # the range [-1, 1] has a peak of 2
