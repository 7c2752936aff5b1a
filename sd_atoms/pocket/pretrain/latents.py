"""What the UNet learns from, computed once: latents of the pictures."""

from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from sd_atoms.files import replacing
from sd_atoms.pocket.manifest import file_entry
from sd_atoms.pocket.pretrain.images import SHARD_PICTURES, Pictures, to_unit_range
from sd_atoms.pocket.pretrain.loop import mixed_precision

BATCH_PICTURES = 64
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@torch.no_grad()
def prepare_latents(work_dir: Path, pictures: Pictures, state: PartialState) -> None:
    """Writes `work_dir`/latents in shards of SHARD_PICTURES, float16; shards made by the same autoencoder are kept.

    Each shard holds "moments" (n, 2 * latent channels, h, w), mean and standard deviation.
    """
    vae = AutoencoderKL.from_pretrained(work_dir / "vae").eval().to(state.device)
    made_by = str(file_entry(work_dir / VAE_FILE)["sha256"])
    folder = work_dir / "latents"
    starts = range(0, len(pictures), SHARD_PICTURES)
    own = [first for first in starts if not _is_made_by(_shard_path(folder, first), made_by)]
    state.wait_for_everyone()  # nobody may write before all have looked
    own = own[state.process_index :: state.num_processes]
    for first in tqdm(own, desc="latents", unit="shard", disable=None if state.is_main_process else True):
        moments = []
        end = min(len(pictures), first + SHARD_PICTURES)
        for batch_first in range(first, end, BATCH_PICTURES):
            indices = range(batch_first, min(end, batch_first + BATCH_PICTURES))
            with mixed_precision(state.device):
                posterior = vae.encode(to_unit_range(pictures.batch(indices)).to(state.device)).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.std], 1).half().cpu())
        with replacing(_shard_path(folder, first)) as temporary:
            save_file({"moments": torch.cat(moments).contiguous()}, temporary, metadata={"made_by": made_by})
    state.wait_for_everyone()


def load_latents(work_dir: Path) -> torch.Tensor:
    """(n, 2 * latent channels, h, w) float16: mean and deviation of every picture's latents."""
    paths = sorted((work_dir / "latents").glob("shard-*.safetensors"))
    return torch.cat([load_file(path)["moments"] for path in paths])


def _shard_path(folder: Path, first: int) -> Path:
    return folder / f"shard-{first:06}.safetensors"


def _is_made_by(path: Path, made_by: str) -> bool:
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        return file.metadata()["made_by"] == made_by
