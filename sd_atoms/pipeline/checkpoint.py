"""A base with adapters merged into it: a folder as diffusers has it, and the same as one LDM file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from sd_atoms.errors import UserError
from sd_atoms.files import replacing_folder
from sd_atoms.formats.keys import TEXT, UNET
from sd_atoms.pipeline.export import Layers, ReadBack, write_tensors
from sd_atoms.pipeline.single_file import ldm_state
from sd_atoms.pipeline.tokens import add_placeholder_tokens


@torch.no_grad()
def merge_into(pipe, layers: Layers, tokens: Mapping[str, torch.Tensor]) -> int:
    """Adds changes to the weights of a plain float32 pipeline, and the tokens to its vocabulary, in place.

    Returns:
        How many rows its table of words had before.
    """
    vocabulary = len(pipe.text_encoder.get_input_embeddings().weight)
    add_placeholder_tokens(pipe, tokens)
    for (place, name), change in layers.items():
        module = getattr(pipe, place).get_submodule(name)
        for parameter, value in change.values.items():
            module.get_parameter(parameter).add_(value)
    return vocabulary


@torch.no_grad()
def write_checkpoint(file: Path, folder: Path, pipe, layers: Layers, vocabulary: int, dtype: torch.dtype) -> ReadBack:
    """Writes a merged pipeline, which ends in that dtype, as an LDM file and as a folder, then reads both back.

    Raises:
        UserError: a place cannot be written to, a weight is too large for the dtype, LDM has no name for a module, or
            what is read back is not what was written.
    """
    merged = {key: _parameters(pipe, *key) for key in layers}  # float32
    pipe.to(dtype)
    state = ldm_state(pipe, vocabulary)
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(f"{file}: {broken[0]} is too large for {dtype}; pass --dtype fp32 or bf16")
    write_tensors(file, {key: value.contiguous().clone() for key, value in state.items()}, {})
    with safe_open(file, "pt") as written:
        wrong = [key for key, value in state.items() if not torch.equal(written.get_tensor(key), value)]
    if wrong:
        raise UserError(f"{file}: {wrong[0]} is read back other than it was written")
    with replacing_folder(folder) as place:
        pipe.save_pretrained(place, safe_serialization=True)
    read = {place: _weights(folder / place) for place in (UNET, TEXT)}
    errors = {}
    for (place, name), change in layers.items():
        apart = sum(
            float((read[place][f"{name}.{parameter}"].double() - merged[place, name][parameter]).square().sum())
            for parameter in change.values
        )
        whole = sum(float(value.double().square().sum()) for value in change.values.values())
        errors[name] = (apart / whole) ** 0.5
    return ReadBack(errors)


def _parameters(pipe, place: str, name: str) -> dict[str, torch.Tensor]:
    module = getattr(pipe, place).get_submodule(name)
    return {key: value.detach().clone() for key, value in module.named_parameters(recurse=False)}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a part of a folder, which may lie in several files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key.removeprefix("text_model."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found
