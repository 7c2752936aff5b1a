"""Opening the base model: the packaged `pocket`, a local folder or a hub id, all by the same calls."""

import copy
import os
import re
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextModel

from sd_atoms.errors import UserError
from sd_atoms.pipeline.description import WHOLE_MODEL, describe_file, is_whole_model
from sd_atoms.sources import packaged_path, resolve_source

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONFIG_FILES = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
                "scheduler/scheduler_config.json", "tokenizer")  # fmt: skip
UNCHECKED = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def open_base(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    base_config: str | None = None,
    inpainting: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> StableDiffusionPipeline:
    """Opens a Stable Diffusion v1/v2 pipeline, from safetensors only, without its safety checker.

    Args:
        name: "pocket", a folder as `save_pretrained` writes it, one .safetensors file under LDM's names, or a hub id.
        revision: git revision of a hub id; None = its main branch.
        variant: file variant such as "fp16"; None = the plain files, or of a folder without them its only variant.
        base_config: of a base in one file, which has no configs and no tokenizer: a folder or hub id that has them, of
            the same architecture. Where the scheduler predicts v, it says so. None asks the hub, or what is cached.
        inpainting: take a base for inpainting too, whose UNet sees a mask beside the latents.
        dtype: dtype of all weights.
        device: where the weights go.

    Raises:
        UserError: there is no such model, it is of another kind, or the hub cannot be reached.
    """
    quiet_unless_terminal()
    source = str(packaged_path(name) or resolve_source(name, "pretrained_model_name_or_path"))
    if os.path.isfile(source):
        unused = [f"{key}: {value!r}" for key, value in (("revision", revision), ("variant", variant)) if value]
        if unused:
            raise UserError(f"{unused[0]} is for a hub id or folder, and {name} is a file")
        return _checked(name, _open_file(name, Path(source), base_config, dtype), device)
    if base_config is not None:
        raise UserError(f"base_config: {base_config!r} is for a base in one file, and {name} is none")
    if revision is not None and os.path.exists(source):
        raise UserError(f"revision: {revision!r} is for a hub id, and {name} is a folder")
    variant = variant or _only_variant(source)
    try:
        kind = StableDiffusionPipeline.load_config(source, revision=revision).get("_class_name")
        if kind != "StableDiffusionPipeline" and not (inpainting and kind == "StableDiffusionInpaintPipeline"):
            raise UserError(f"{name}: it is a {kind}; a StableDiffusionPipeline (v1 or v2) is needed")
        lacking = [part for part in PARTS if os.path.isdir(source) and not os.path.isdir(os.path.join(source, part))]
        if lacking:  # of a tokenizer, the library makes an empty one without a word
            raise UserError(f"{name}: it lacks {', '.join(f'{part}/' for part in lacking)}; copy it from its original")
        how = dict(revision=revision, variant=variant, dtype=dtype, use_safetensors=True)
        # by itself, since of what its file lacks the library makes random numbers and says so in a log alone
        text_encoder, found = CLIPTextModel.from_pretrained(
            source, subfolder="text_encoder", output_loading_info=True, **how
        )
        if found["missing_keys"]:
            missing = sorted(found["missing_keys"])
            raise UserError(f"{name}: the weights in text_encoder/ lack {len(missing)} tensors ({missing[0]})")
        pipe = StableDiffusionPipeline.from_pretrained(source, text_encoder=text_encoder, **how, **UNCHECKED)
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever they trip over in a broken file
        raise UserError(f"{name}: {_reason(source, variant, error)}") from error
    return _checked(name, pipe, device)


def _checked(name: str, pipe: StableDiffusionPipeline, device: str | torch.device) -> StableDiffusionPipeline:
    try:
        pipe.to(device)
        read, taken = pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings
        if not 0 < read <= taken:
            raise UserError(
                f"{name}: its tokenizer reads {read} tokens, its text encoder takes {taken}; set model_max_length in "
                "tokenizer/tokenizer_config.json"
            )
        _try_out(pipe)
    except UserError:
        raise
    except NotImplementedError as error:  # parts of it are on the meta device still
        raise UserError(f"{name}: it lacks weights ({error})") from error
    except Exception as error:  # whatever the libraries trip over where a config holds something else
        raise UserError(f"{name}: its configs and weights do not work together ({_first_line(error)})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def _try_out(pipe: StableDiffusionPipeline) -> None:
    """One small step of every part: a value of the wrong type in a config is not used before."""
    tokens = pipe.tokenizer("a", padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = pipe.text_encoder(tokens.to(pipe.device)).last_hidden_state
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(2, device=pipe.device)
    side = 2 ** (len(pipe.unet.config.block_out_channels) - 1)  # the smallest that the UNet can halve and double
    latents = torch.zeros(1, pipe.unet.config.in_channels, side, side, dtype=pipe.unet.dtype, device=pipe.device)
    timestep = scheduler.timesteps[0]
    predicted = pipe.unet(scheduler.scale_model_input(latents, timestep), timestep, states).sample
    stepped = scheduler.step(predicted, timestep, latents[:, : predicted.shape[1]]).prev_sample
    pipe.vae.decode(stepped.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor)


def _open_file(name: str, path: Path, base_config: str | None, dtype: torch.dtype) -> StableDiffusionPipeline:
    """A pipeline from one file."""
    if path.suffix != ".safetensors":
        raise UserError(f"{name}: only .safetensors files are read; pickles (.ckpt, .pt, .bin) can run code")
    found = describe_file(path)
    if found["kind"] != WHOLE_MODEL:
        raise UserError(f"{name}: it is no whole model but {found['kind']}")
    if found["base"] == "SDXL":
        raise UserError(f"{name}: it is an SDXL model; Stable Diffusion v1 or v2 is needed")
    source = base_config and str(packaged_path(base_config) or resolve_source(base_config, "base_config"))
    if source and os.path.isdir(source):
        lacking = [file for file in CONFIG_FILES if not os.path.exists(os.path.join(source, file))]
        if lacking:
            raise UserError(f"base_config: {base_config} lacks {', '.join(lacking)}")
    try:
        return StableDiffusionPipeline.from_single_file(
            str(path),
            config=source,
            torch_dtype=dtype,
            local_files_only=bool(source and os.path.isdir(source)),
            **UNCHECKED,
        )
    except Exception as error:  # the libraries raise whatever they trip over
        if source and os.path.isdir(source):
            reason = _first_line(error)
            raise UserError(f"{name}: does not fit the configs in base_config={base_config} ({reason})") from error
        raise UserError(
            f"{name}: the configs and tokenizer of its kind are not in the local cache, and the hub did not provide "
            "them; pass --base_config, a folder that has them"
        ) from error


def is_model(name: str) -> bool:
    """Whether a source is a whole model, in a folder or in one file, and no adapter."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return is_whole_model(file.keys())
        except (SafetensorError, OSError):
            return False  # reading it as an adapter says what is wrong
    return packaged_path(name) is not None or (path / "model_index.json").is_file()


def quiet_unless_terminal() -> None:
    """The libraries draw progress bars into log files too; only a terminal gets them."""
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def _variants(source: str) -> set[str]:
    """The file variants of a folder's UNet, "" for the plain files; those of a sharded one are named alike."""
    names = [file.name.split(".")[1:-1] for file in Path(source, "unet").glob("*.safetensors")]
    return {re.sub(r"-\d{5}-of-\d{5}$", "", parts[0]) if parts else "" for parts in names}


def _only_variant(source: str) -> str | None:
    """The variant of a folder that has but one, and no plain files."""
    variants = _variants(source)
    return variants.pop() or None if len(variants) == 1 else None


def _reason(source: str, variant: str | None, error: Exception) -> str:
    if os.path.isdir(source):
        variants = _variants(source) - {""}
        if variants and variant not in variants:
            return f"its weights are of variant {', '.join(sorted(variants))} only; pass --variant {min(variants)}"
        return f"cannot be opened as a pipeline folder with safetensors files ({_first_line(error)})"
    return (
        "not in the local cache, and the hub did not provide it (no network, no such id or revision, or a licence to "
        "accept first); pass a local folder, or run once with a network"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
