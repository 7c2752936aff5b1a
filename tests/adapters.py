"""Adapters of every method with random numbers, without a training."""

import torch

from sd_atoms.methods import get_method
from sd_atoms.methods.adapters import add_adapter
from sd_atoms.pipeline import add_placeholder_tokens, open_base, save_adapter

TOKEN = "<castle>"


@torch.no_grad()
def write_adapter(path, base, method, size=0.1, tokens=(TOKEN,), target=None, base_name=None, **settings):
    """Writes an adapter of a method whose every number is drawn at random around its start."""
    pipe, made = open_base(base), get_method(method)
    generator = torch.Generator().manual_seed(3)
    for parameter in (
        add_adapter(pipe.unet, made.make_config(pipe.unet, settings, target)) if method != "token" else ()
    ):
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    width = pipe.text_encoder.config.hidden_size
    add_placeholder_tokens(pipe, {token: torch.randn(width, generator=generator) * 0.1 for token in tokens})
    about = {"base": base_name or base, "tokens": dict.fromkeys(tokens, "castle")}
    about |= {} if method == "atoms" else {"method": method}
    return save_adapter(pipe, path, tokens=list(tokens), about=about)
