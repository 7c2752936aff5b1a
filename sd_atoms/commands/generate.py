"""Draws pictures from prompt templates with an adapter."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from sd_atoms.data.prompts import check_lengths, fill, load_templates, parse_seeds
from sd_atoms.errors import UserError
from sd_atoms.generation import (
    GRID_NOTE,
    Request,
    generate_missing,
    image_notes,
    making_notes,
    read_images,
    save_image,
)
from sd_atoms.machine import make_accelerator, on_main
from sd_atoms.methods.adapters import adapters_off, set_adapters
from sd_atoms.pipeline import DTYPES, load_adapter, open_base
from sd_atoms.pipeline.header import find_base, find_base_config, parse_header
from sd_atoms.pipeline.sampling import SCHEDULERS
from sd_atoms.pipeline.sizes import check_drawn_size
from sd_atoms.report.grid import image_grid
from sd_atoms.settings import setting
from sd_atoms.training.adapter import open_adapter

GRID = "grid.png"
MODEL, WHAT, HOW = "model", "what to draw", "how to draw it"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms generate`. What is left out comes from the adapter's own header."""

    adapter: str = setting(
        None, MODEL, "run or adapter folder, one .safetensors file, a run's checkpoint, or hub id", required=True
    )
    adapter_scale: float = setting(1.0, MODEL, "strength of the adapter")
    pretrained_model_name_or_path: str | None = setting(
        None, MODEL, "the base; none = the one it was trained on", aliases=["base"]
    )
    base_config: str | None = setting(
        None, MODEL, "of a base in one file: a folder or hub id with its configs; none = as the adapter's run says"
    )
    revision: str | None = setting(None, MODEL, "git revision of the base")
    variant: str | None = setting(None, MODEL, "file variant of the base such as fp16")
    dtype: str = setting("fp32", MODEL, "of the weights", choices=tuple(DTYPES))

    prompts: str = setting(
        None, WHAT, "text file of templates, {} for the concept, one per line, or few_shot", required=True, file=True
    )
    token: str | None = setting(None, WHAT, "what {} becomes; none = the adapter's placeholder")
    seeds: str = setting("0-3", WHAT, "such as 0-3,7: one picture per prompt and seed")
    out: str = setting(None, WHAT, "folder for the pictures and grid.png", required=True)
    compare_base: bool = setting(False, WHAT, "also draw every picture with the base alone")
    base_token: str | None = setting(
        None, WHAT, "what {} becomes for the base; none = the word the token started from"
    )
    overwrite: bool = setting(False, WHAT, "draw pictures again that are there already")

    guidance_scale: float | None = setting(None, HOW, "classifier-free guidance; none = as in training", low=0.0)
    num_inference_steps: int | None = setting(None, HOW, "denoising steps; none = as in training", low=1, high=1000)
    scheduler: str | None = setting(None, HOW, "sampler; none = as in training", choices=SCHEDULERS)
    resolution: int | None = setting(None, HOW, "side in pixels; none = as in training", low=32, high=4096)
    generation_batch_size: int = setting(1, HOW, "pictures a process draws together; last bits follow it", low=1)


def run(config: Settings) -> Path:
    """Draws what the folder lacks, then its grid; returns the folder.

    Raises:
        UserError: something in the settings is wrong, or the folder holds other pictures of the same names.
    """
    templates, seeds = load_templates(config.prompts), parse_seeds(config.seeds)
    artefact = open_adapter(config.adapter, config.pretrained_model_name_or_path, config.base_config)
    header = parse_header(config.adapter, artefact.about)
    base = find_base(config.pretrained_model_name_or_path, config.adapter, header)
    token = config.token or next(iter(artefact.tokens), None)
    if token is None:
        raise UserError(f"token is required: {config.adapter} brings no word of its own")
    if config.adapter_scale != 1 and artefact.config is None and artefact.text_config is None:
        scale = f"adapter_scale={config.adapter_scale:g}"
        raise UserError(f"{scale}: {config.adapter} has tokens alone, which have no strength")
    base_token = config.base_token or header.tokens.get(token) or token
    chosen = {
        key: getattr(config, key) for key in ("guidance_scale", "num_inference_steps", "scheduler", "resolution")
    }
    sampling = dataclasses.replace(header.sampling, **{k: value for k, value in chosen.items() if value is not None})
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file")
    if (out / "config.yaml").exists():
        raise UserError(f"out: {out} is a run folder; name another folder for the pictures, such as {out / 'more'}")

    accelerator = make_accelerator()
    on_main(accelerator, lambda: check_grid(out / GRID, config.overwrite))
    pipe = open_base(
        base,
        revision=config.revision,
        variant=config.variant,
        base_config=find_base_config(config.base_config, config.adapter, base),
        dtype=DTYPES[config.dtype],
        device=accelerator.device,
    )
    check_drawn_size(pipe, sampling.resolution)
    load_adapter(pipe, artefact)
    for part in (pipe.unet, pipe.text_encoder):
        set_adapters(part, ["default"], [config.adapter_scale])
    requests = _requests(templates, token, seeds, "")
    check_lengths(pipe.tokenizer, [request.prompt for request in requests])
    notes = making_notes(Path(config.adapter).name, base) | {
        "adapter_digest": artefact.digest(),
        "adapter_scale": str(config.adapter_scale),
        "dtype": config.dtype,
    }
    generate_missing(pipe, accelerator, requests, sampling, out, notes, config.overwrite, config.generation_batch_size)
    base_requests = _requests(templates, base_token, seeds, "base-") if config.compare_base else []
    if config.compare_base:
        notes = making_notes("none", base) | {"dtype": config.dtype}
        with adapters_off(pipe.unet, pipe.text_encoder):
            generate_missing(
                pipe, accelerator, base_requests, sampling, out, notes, config.overwrite, config.generation_batch_size
            )
    if accelerator.is_main_process:
        rows, labels = [], []
        for index, template in enumerate(templates):
            place = slice(index * len(seeds), (index + 1) * len(seeds))
            if config.compare_base:
                rows.append(read_images(out, base_requests[place]))
                labels.append(f"base: {fill(template, base_token)}")
            rows.append(read_images(out, requests[place]))
            labels.append(fill(template, token))
        grid = image_grid(rows, labels, [f"seed {seed}" for seed in seeds])
        save_image(out / GRID, grid, {GRID_NOTE: ", ".join(labels)})
        print(f"{len(requests) + len(base_requests)} pictures and {GRID} are in {out}")
    accelerator.end_training()
    return out


def check_grid(path: Path, overwrite: bool) -> None:
    """Refuses to replace a picture of the grid's name; a grid of the pictures beside it may be made again.

    Raises:
        UserError: it is another picture.
    """
    if path.exists() and not overwrite and GRID_NOTE not in image_notes(path):
        raise UserError(f"{path}: exists and is no grid of `generate`; move it, or pass --overwrite")


def _requests(templates: list[str], concept: str, seeds: list[int], prefix: str) -> list[Request]:
    return [
        Request(fill(template, concept), seed, f"{prefix}prompt{index:02d}-seed{seed}")
        for index, template in enumerate(templates)
        for seed in seeds
    ]
