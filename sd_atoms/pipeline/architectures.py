"""The UNets of well-known bases: their configs, and instances of them with random weights or none."""

import json

import torch
from diffusers import UNet2DConditionModel

from sd_atoms.errors import UserError
from sd_atoms.sources import packaged_path

# what is not said here is as diffusers has it by default, which is Stable Diffusion v1
SD_V1_4 = {"sample_size": 64, "in_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768}

SD_V2_1 = {
    **SD_V1_4,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],  # heads, as in every config of this class
    "use_linear_projection": True,
}

SDXL = {
    **SD_V1_4,
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

UNETS = {"sd-v1-4": SD_V1_4, "sd-v2-1": SD_V2_1, "sdxl": SDXL}
ARCHITECTURES = (*UNETS, "pocket")


def unet_config(arch: str) -> dict:
    """The config of a UNet2DConditionModel, for one of ARCHITECTURES.

    Raises:
        UserError: the architecture is unknown, or the pocket pipeline is not part of this installation.
    """
    if arch in UNETS:
        return UNETS[arch]
    if arch != "pocket":
        raise UserError(f"--arch {arch!r}: one of {', '.join(ARCHITECTURES)} is allowed")
    path = packaged_path("pocket") / "unet" / "config.json"
    if not path.is_file():
        raise UserError(f"--arch pocket: {path} is missing from this installation; {', '.join(UNETS)} are allowed")
    return json.loads(path.read_text(encoding="utf-8"))


def build_unet(config: dict, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> UNet2DConditionModel:
    """A UNet2DConditionModel with seeded random weights, in training mode; on device "meta" it has shapes only."""
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built as it is used: casting afterwards would raise the peak of memory
    try:
        with torch.device(device):
            return UNet2DConditionModel.from_config(config).train()
    finally:
        torch.set_default_dtype(usual)
