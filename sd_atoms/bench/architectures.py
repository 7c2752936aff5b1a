"""What goes into the UNets that are measured, and the shapes of their convolutions."""

from typing import NamedTuple

import torch
from torch import nn

from sd_atoms.atoms import ConvGeometry
from sd_atoms.errors import UserError
from sd_atoms.pipeline.architectures import build_unet

LATENT_PX = 8  # pixels of the picture per latent position
TEXT_TOKENS = 77


class ConvCall(NamedTuple):
    """One kind of convolution in a forward pass: what goes in, the layer's shape and how often it occurs."""

    in_channels: int
    out_channels: int
    input_size: tuple[int, int]  # height, width
    kernel: tuple[int, int]
    geometry: ConvGeometry
    count: int

    @property
    def output_size(self) -> tuple[int, int]:
        return self.geometry.output_size(self.input_size, self.kernel)


def latent_size(resolution_px: int) -> int:
    """Latent positions along a side of a picture.

    Raises:
        UserError: the resolution is not a multiple of 8.
    """
    if resolution_px % LATENT_PX:
        raise UserError(f"--resolution {resolution_px}: a multiple of {LATENT_PX} is allowed")
    return resolution_px // LATENT_PX


def step_inputs(config: dict, batch_size: int, resolution_px: int, device: str, dtype: torch.dtype) -> tuple:
    """Latents (N, 4, h, w), timesteps (N,) and text states (N, 77, cross_attention_dim), seeded normal noise."""
    side = latent_size(resolution_px)
    generator = None if device == "meta" else torch.Generator().manual_seed(1)
    host = "meta" if device == "meta" else "cpu"  # drawn on the CPU: the same numbers on every device
    latents = torch.randn(batch_size, config["in_channels"], side, side, generator=generator, device=host)
    states = torch.randn(batch_size, TEXT_TOKENS, config["cross_attention_dim"], generator=generator, device=host)
    timesteps = torch.full((batch_size,), 500, device=device)
    return latents.to(device, dtype), timesteps, states.to(device, dtype)


def conv3x3_calls(config: dict, batch_size: int, resolution_px: int) -> list[ConvCall]:
    """The distinct 3×3 convolutions of one forward pass, in order of first use; found without computing anything."""
    unet = build_unet(config, "meta")
    counts: dict[tuple, int] = {}

    def note(conv, inputs):
        geometry = ConvGeometry(conv.stride, conv.padding, conv.dilation, conv.groups)
        size = tuple(inputs[0].shape[2:])
        key = (conv.in_channels, conv.out_channels, size, conv.kernel_size, geometry)
        counts[key] = counts.get(key, 0) + 1

    for module in unet.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        unet(*step_inputs(config, batch_size, resolution_px, "meta", torch.float32))
    return [ConvCall(*key, count) for key, count in counts.items()]
