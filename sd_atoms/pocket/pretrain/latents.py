"""What the UNet learns from, computed once: latents of the pictures and text encoder states of captions."""

import random
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from sd_atoms.files import replacing
from sd_atoms.pocket.manifest import file_entry
from sd_atoms.pocket.pretrain.images import SHARD_PICTURES, Pictures, to_unit_range
from sd_atoms.pocket.pretrain.loop import mixed_precision
from sd_atoms.pocket.pretrain.settings import UnetSettings
from sd_atoms.pocket.world import caption

BATCH_PICTURES = 64
MODEL_FILES = ("vae/diffusion_pytorch_model.safetensors", "clip/model.safetensors")


@torch.no_grad()
def prepare_latents(work_dir: Path, settings: UnetSettings, state: PartialState) -> None:
    """Writes `work_dir`/latents in shards of SHARD_PICTURES, float16; shards made by the same models are kept.

    Each shard holds "moments" (n, 2 * latent channels, h, w), mean and standard deviation, and "states"
    (n, captions, tokens, width); empty.safetensors holds the "states" (tokens, width) of the empty caption.
    """
    tokenizer = CLIPTokenizer.from_pretrained(work_dir / "tokenizer")
    vae = AutoencoderKL.from_pretrained(work_dir / "vae").eval().to(state.device)
    clip = CLIPModel.from_pretrained(work_dir / "clip").eval().to(state.device)
    pictures = Pictures(work_dir, "train")
    made_by = " ".join(str(file_entry(work_dir / name)["sha256"]) for name in MODEL_FILES)
    folder = work_dir / "latents"
    starts = range(0, len(pictures), SHARD_PICTURES)
    own = [first for first in starts if not _is_made_by(_shard_path(folder, first), made_by)]
    state.wait_for_everyone()  # nobody may write before all have looked
    own = own[state.process_index :: state.num_processes]
    for first in tqdm(own, desc="latents", unit="shard", disable=None if state.is_main_process else True):
        phrasing = random.Random(100 + first)
        moments, states = [], []
        end = min(len(pictures), first + SHARD_PICTURES)
        for batch_first in range(first, end, BATCH_PICTURES):
            indices = range(batch_first, min(end, batch_first + BATCH_PICTURES))
            with mixed_precision(state.device):
                posterior = vae.encode(to_unit_range(pictures.batch(indices)).to(state.device)).latent_dist
                phrasings = [
                    caption_states(clip, tokenizer, [caption(pictures.scenes[index], phrasing) for index in indices])
                    for _ in range(settings.captions_per_picture)
                ]
            moments.append(torch.cat([posterior.mean, posterior.std], 1).half().cpu())
            states.append(torch.stack(phrasings, 1).half().cpu())
        tensors = {"moments": torch.cat(moments).contiguous(), "states": torch.cat(states).contiguous()}
        _save(_shard_path(folder, first), tensors, made_by)
    if state.is_main_process:
        empty = caption_states(clip, tokenizer, [""])[0].half().cpu()
        _save(folder / "empty.safetensors", {"states": empty}, made_by)
    state.wait_for_everyone()


def caption_states(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """(n, tokens, width): what the pipeline feeds to cross-attention, padded to full length as it pads."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return clip.text_model(tokens.to(clip.device)).last_hidden_state


class CaptionedLatents:
    """The prepared latents and caption states, all in memory."""

    def __init__(self, work_dir: Path):
        shards = [load_file(path) for path in sorted((work_dir / "latents").glob("shard-*.safetensors"))]
        self._moments = [shard["moments"] for shard in shards]
        self._states = [shard["states"] for shard in shards]
        self.empty_states = load_file(work_dir / "latents" / "empty.safetensors")["states"].float()
        self.captions_per_picture = self._states[0].shape[1]

    def __len__(self) -> int:
        return sum(len(moments) for moments in self._moments)

    def batch(self, indices: np.ndarray, captions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and deviation of the latents, (n, c, h, w) each, and states (n, tokens, width), all float32."""
        places = [divmod(int(index), SHARD_PICTURES) for index in indices]
        moments = torch.stack([self._moments[shard][row] for shard, row in places]).float()
        mean, deviation = moments.chunk(2, dim=1)
        states = [self._states[shard][row, choice] for (shard, row), choice in zip(places, captions, strict=True)]
        return mean, deviation, torch.stack(states).float()


def _shard_path(folder: Path, first: int) -> Path:
    return folder / f"shard-{first:06}.safetensors"


def _save(path: Path, tensors: dict[str, torch.Tensor], made_by: str) -> None:
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"made_by": made_by})


def _is_made_by(path: Path, made_by: str) -> bool:
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        return file.metadata()["made_by"] == made_by
