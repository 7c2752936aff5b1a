"""A Stable-Diffusion-shaped base with random weights, and photos to teach it, both made in a second.

The numbers are the same on every machine: they are uniform draws of numpy's legacy generator, whose stream is frozen,
scaled by exact steps; no network library draws any of them. Only diffusers, transformers and a tokenizer of its own
are used, so that no move of the package's modules or weights touches this file.
"""

import contextlib
import os
import runpy
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIDE = 64  # px of its pictures
TOKENIZER = Path(__file__).parent / "golden" / "tokenizer"  # of the older commit; the packaged one may change
# name -> width, height, caption; no two shapes alike, none of them square
PHOTOS = {
    "1": (96, 64, "a {} in snow"),
    "2": (64, 112, "photo of a {} at night"),
    "3": (80, 72, "<castle> by a lake"),
}


def write_tiny_base(folder: str | Path) -> Path:
    """Writes a StableDiffusionPipeline of some 80,000 numbers that draws pictures of `SIDE` px; returns the folder."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        **ids,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    vae = AutoencoderKL(
        sample_size=SIDE,
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    pipe = StableDiffusionPipeline(
        unet=unet,
        text_encoder=CLIPTextModel(text),
        vae=vae,
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.scheduler.register_to_config(clip_sample=False)  # what DDIM, made from it, goes by
    for part in ("unet", "text_encoder", "vae"):
        _fill(getattr(pipe, part), part)
    pipe.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def write_photos(folder: str | Path) -> Path:
    """Writes `PHOTOS` as PNG files with a caption beside each: coloured waves, made of whole numbers alone."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    for number, (name, (width, height, caption)) in enumerate(PHOTOS.items(), 1):
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x * x * number + y * 3, y * y + x * 2 * number, x * y + 40 * number], axis=2) // 16
        pixels = np.abs(pixels % 510 - 255).astype(np.uint8)  # a sawtooth up and down, so without hard edges
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def train(words: list[str]) -> None:
    """train_dreambooth_atoms.py with these words, in this process; it has to succeed."""
    script = Path(__file__).parents[1] / "train_dreambooth_atoms.py"
    with mock.patch.object(sys, "argv", [str(script), *words]):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            assert stop.code == 0  # noqa: PT017 (a script that ends without SystemExit has succeeded too)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """On one core and thread for a while: a run takes all there are, and such small ones get slower by it."""
    threads, cores = torch.get_num_threads(), None
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)


@torch.no_grad()
def _fill(module: nn.Module, label: str) -> None:
    """Weights of unit gain, norms near one, small biases; each parameter's draws depend on its name alone."""
    norms = {
        f"{name}.weight" for name, part in module.named_modules() if isinstance(part, (nn.GroupNorm, nn.LayerNorm))
    }
    for name, parameter in module.named_parameters():
        draws = np.random.RandomState(zlib.crc32(f"{label}.{name}".encode())).random_sample(parameter.shape) * 2 - 1
        if name in norms:
            draws = 1 + draws / 4
        elif parameter.ndim < 2:
            draws = draws / 8
        elif "embedding" in name and label == "text_encoder":
            draws = draws / 2
        else:
            draws = draws * np.sqrt(3 / parameter[0].numel())
        parameter.copy_(torch.from_numpy(draws.astype(np.float32)))
