"""Opening the base model: the packaged `pocket`, a local folder or a hub id, all by the same calls."""

import os
import sys

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline

from sd_atoms.errors import UserError
from sd_atoms.sources import packaged_path, resolve_source

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_base(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> StableDiffusionPipeline:
    """Opens a Stable Diffusion v1/v2 pipeline, from safetensors only, without its safety checker.

    Args:
        name: "pocket", a folder as `save_pretrained` writes it, or a hub id.
        revision: git revision of a hub id; None = its main branch.
        variant: file variant such as "fp16"; None = the plain files.
        dtype: dtype of all weights.
        device: where the weights go.

    Raises:
        UserError: there is no such model, it is of another kind, or the hub cannot be reached.
    """
    quiet_unless_terminal()
    source = str(packaged_path(name) or resolve_source(name, "pretrained_model_name_or_path"))
    try:
        kind = StableDiffusionPipeline.load_config(source, revision=revision).get("_class_name")
        if kind != "StableDiffusionPipeline":
            raise UserError(f"{name}: it is a {kind}; a StableDiffusionPipeline (v1 or v2) is needed")
        pipe = StableDiffusionPipeline.from_pretrained(
            source,
            revision=revision,
            variant=variant,
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {_reason(source, error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def quiet_unless_terminal() -> None:
    """The libraries draw progress bars into log files too; only a terminal gets them."""
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def _reason(source: str, error: Exception) -> str:
    if os.path.isdir(source):
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"cannot be opened as a pipeline folder with safetensors files ({first_line})"
    return (
        "not in the local cache, and the hub did not provide it (no network, no such id or revision, or a licence to "
        "accept first); pass a local folder, or run once with a network"
    )
