"""Draws pictures from prompts with adapters, from nothing, from a picture or inside a mask."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sd_atoms.data.prompts import check_lengths, fill, load_templates, parse_seeds
from sd_atoms.errors import UserError
from sd_atoms.generation import (
    GRID_NOTE,
    Conditions,
    Request,
    generate_missing,
    image_notes,
    making_notes,
    read_images,
    save_image,
)
from sd_atoms.generation.conditions import (
    IMAGE_STRENGTH,
    MASK_STRENGTH,
    check_conditions,
    read_conditions_images,
)
from sd_atoms.generation.record import HUB, command_notes, making, sha256_of
from sd_atoms.generation.weights import plain_texts
from sd_atoms.machine import make_accelerator, on_main
from sd_atoms.methods.adapters import adapters_off
from sd_atoms.pipeline import DTYPES, Artefact, open_base
from sd_atoms.pipeline.header import Header, find_base, find_base_config, parse_header
from sd_atoms.pipeline.sampling import SAMPLERS, Sampling, check_sampler, read_options
from sd_atoms.pipeline.sizes import check_drawn_size
from sd_atoms.pipeline.together import load_together, split_strength
from sd_atoms.report.grid import image_grid
from sd_atoms.settings import setting, unmet_needs
from sd_atoms.training.adapter import open_adapter

GRID = "grid.png"
MODEL, WHAT, HOW, START = "model", "what to draw", "how to draw it", "start from a picture"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms generate`. What is left out comes from the header of the first adapter that has one."""

    adapter: tuple[str, ...] = setting(
        (),
        MODEL,
        "run or adapter folder, one .safetensors file, LoRA files of other programs too, a run's checkpoint, or hub "
        "id; PATH=0.8 sets its strength, and the flag may come several times",
        many=True,
        required=True,
        unless=["pretrained_model_name_or_path"],
    )
    adapter_scale: float = setting(1.0, MODEL, "strength of adapters that say none of their own")
    pretrained_model_name_or_path: str | None = setting(
        None, MODEL, "the base; none = the one it was trained on", aliases=["base"]
    )
    base_config: str | None = setting(
        None, MODEL, "of a base in one file: a folder or hub id with its configs; none = as the adapter's run says"
    )
    revision: str | None = setting(None, MODEL, "git revision of the base")
    variant: str | None = setting(None, MODEL, "file variant of the base such as fp16")
    dtype: str = setting("fp32", MODEL, "of the weights", choices=tuple(DTYPES))

    prompt: tuple[str, ...] = setting(
        (), WHAT, "a prompt, {} for the concept if you like; the flag may come several times", many=True
    )
    prompts: str | None = setting(
        None,
        WHAT,
        "text file of prompts, one per line, with {} or a word of the adapters in each, or few_shot",
        required=True,
        unless=["prompt"],
        file=True,
    )
    negative_prompt: str | None = setting(None, WHAT, "what should not be in any picture")
    prompt_weights: bool = setting(False, WHAT, "read (word)1.3 and word++ in prompts as weights, by compel")
    token: str | None = setting(None, WHAT, "what {} becomes; none = the first adapter's placeholder")
    seeds: str = setting("0-3", WHAT, "such as 0-3,7: one picture per prompt and seed")
    out: str = setting(None, WHAT, "folder for the pictures and grid.png", required=True)
    compare_base: bool = setting(False, WHAT, "also draw every picture with the base alone", needs=["adapter"])
    base_token: str | None = setting(
        None, WHAT, "what {} becomes for the base; none = the word the token started from"
    )
    overwrite: bool = setting(False, WHAT, "draw pictures again that are there already")

    image: str | None = setting(None, START, "picture to start from (img2img)", file=True)
    image_strength: float | None = setting(
        None,
        START,
        f"share of the steps that is drawn on it; none = {IMAGE_STRENGTH:g}, with a mask {MASK_STRENGTH:g}",
        low=0.0,
        high=1.0,
        needs=["image"],
    )
    mask_image: str | None = setting(
        None,
        START,
        "as large as the picture: white is drawn anew, black stays (inpainting)",
        file=True,
        needs=["image"],
    )

    guidance_scale: float | None = setting(None, HOW, "classifier-free guidance; none = as in training", low=0.0)
    num_inference_steps: int | None = setting(None, HOW, "denoising steps; none = as in training", low=1, high=1000)
    scheduler: str | None = setting(
        None, HOW, f"sampler; none = as in training: {', '.join(SAMPLERS)}, or the name of diffusers' class"
    )
    scheduler_options: str | None = setting(
        None, HOW, "options of the sampler as diffusers has them: use_karras_sigmas=true,timestep_spacing=trailing"
    )
    resolution: int | None = setting(
        None, HOW, "side in pixels, of a picture to start from the side of its area; none = as in training",
        low=32, high=4096,
    )  # fmt: skip
    width: int | None = setting(None, HOW, "in pixels; none = as resolution says", low=32, high=4096)
    height: int | None = setting(None, HOW, "in pixels; none = as resolution says", low=32, high=4096)
    generation_batch_size: int = setting(1, HOW, "pictures a process draws together; last bits follow it", low=1)


@dataclass(frozen=True)
class Drawing:
    """All that settings come to. templates: prompts with {} open. words: token -> the word it started from. notes: of
    every picture. settings: the same with nothing left open. adapter_files, image_files: name -> SHA-256."""

    pipe: Any
    templates: list[str]
    seeds: list[int]
    token: str | None
    base_token: str | None
    words: dict[str, str]
    sampling: Sampling
    conditions: Conditions
    notes: dict[str, str]
    base_notes: dict[str, str]
    settings: Settings
    adapter_files: dict[str, str]
    image_files: dict[str, str]


def run(config: Settings) -> Path:
    """Draws what the folder lacks, then its grid; returns the folder.

    Raises:
        UserError: something in the settings is wrong, or the folder holds other pictures of the same names.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file")
    if (out / "config.yaml").exists():
        raise UserError(f"out: {out} is a run folder; name another folder for the pictures, such as {out / 'more'}")
    accelerator = make_accelerator()
    on_main(accelerator, lambda: check_grid(out / GRID, config.overwrite))
    own = prepare(config, accelerator.device)
    requests = [
        Request(fill(template, own.token or ""), seed, f"prompt{index:02d}-seed{seed}")
        for index, template in enumerate(own.templates)
        for seed in own.seeds
    ]
    base_requests = [
        Request(_base_prompt(own, template), seed, f"base-prompt{index:02d}-seed{seed}")
        for index, template in enumerate(own.templates if config.compare_base else [])
        for seed in own.seeds
    ]

    def draw(requests: Sequence[Request], notes: dict[str, str], settings: Settings, files: dict[str, str]) -> None:
        def record(request: Request, together: int, place: int) -> dict[str, str]:
            one = dataclasses.replace(settings, prompt=(request.prompt,), seeds=str(request.seed))
            return command_notes(one, making(files, together, place, accelerator.device))

        generate_missing(
            own.pipe, accelerator, requests, own.sampling, out, notes, config.overwrite, config.generation_batch_size,
            own.conditions, record,
        )  # fmt: skip

    draw(requests, own.notes, own.settings, own.adapter_files | own.image_files)
    if config.compare_base:
        with adapters_off(own.pipe.unet, own.pipe.text_encoder):
            draw(base_requests, own.base_notes, dataclasses.replace(own.settings, adapter=()), own.image_files)
    if accelerator.is_main_process:
        rows, labels = [], []
        for index in range(len(own.templates)):
            place = slice(index * len(own.seeds), (index + 1) * len(own.seeds))
            if config.compare_base:
                rows.append(read_images(out, base_requests[place]))
                labels.append(f"base: {base_requests[place][0].prompt}")
            rows.append(read_images(out, requests[place]))
            labels.append(requests[place][0].prompt)
        grid = image_grid(rows, labels, [f"seed {seed}" for seed in own.seeds])
        save_image(out / GRID, grid, {GRID_NOTE: ", ".join(labels)})
        print(f"{len(requests) + len(base_requests)} pictures and {GRID} are in {out}")
    accelerator.end_training()
    return out


def prepare(config: Settings, device: torch.device) -> Drawing:
    """Reads adapters, prompts and pictures, and opens the pipeline.

    Raises:
        UserError: something in the settings is wrong; nothing is written.
    """
    unmet = unmet_needs(config)
    if unmet:
        raise UserError("; ".join(unmet))
    seeds = parse_seeds(config.seeds)
    named = [split_strength(text, config.adapter_scale) for text in config.adapter]
    artefacts = [open_adapter(source, config.pretrained_model_name_or_path, config.base_config) for source, _ in named]
    for (source, strength), artefact in zip(named, artefacts, strict=True):
        if strength != 1 and artefact.config is None and artefact.text_config is None:
            raise UserError(f"adapter_scale={strength:g}: {source} has tokens alone, which have no strength")
    headers = [parse_header(source, artefact.about) for (source, _), artefact in zip(named, artefacts, strict=True)]
    first = next((n for n, header in enumerate(headers) if header.base is not None), 0)
    leading = headers[first] if headers else Header()
    base, base_config = config.pretrained_model_name_or_path, config.base_config
    if named:
        base = find_base(base, named[first][0], leading)
        base_config = find_base_config(base_config, named[first][0], base)
    words = {token: header.tokens.get(token) or token for a, header in zip(artefacts, headers, strict=True)
             for token in a.tokens}  # fmt: skip
    token = config.token or next(iter(words), None)
    templates = [*config.prompt]
    if config.prompts:
        templates += load_templates(config.prompts, words, plain=token is None)
    if token is None and any("{}" in template for template in templates):
        raise UserError(f"token is required: {config.adapter[0] if named else base} brings no word of its own")

    pipe = open_base(
        base,
        revision=config.revision,
        variant=config.variant,
        base_config=base_config,
        inpainting=True,
        dtype=DTYPES[config.dtype],
        device=device,
    )
    chosen = {
        key: getattr(config, key) for key in ("guidance_scale", "num_inference_steps", "scheduler", "resolution")
    }
    sampling = dataclasses.replace(leading.sampling, **{k: value for k, value in chosen.items() if value is not None})
    conditions = _conditions(config, pipe, sampling)
    check_conditions(pipe, sampling, conditions)
    load_together(pipe, artefacts, [strength for _, strength in named])
    texts = [fill(template, token or "") for template in templates]
    texts += [config.negative_prompt] if config.negative_prompt else []
    check_lengths(pipe.tokenizer, plain_texts(pipe, texts) if config.prompt_weights else texts)

    size_px = conditions.size_px or (None, None)
    settings = dataclasses.replace(
        config, adapter=tuple(f"{source}={strength!r}" for source, strength in named), adapter_scale=1.0,
        pretrained_model_name_or_path=base, base_config=base_config, prompts=None, token=None, base_token=None,
        compare_base=False, overwrite=False, **dataclasses.asdict(sampling), width=size_px[0], height=size_px[1],
        image_strength=conditions.image_strength if config.image else None, generation_batch_size=1,
    )  # fmt: skip
    images = {name: sha256_of(name) for name in (config.image, config.mask_image) if name is not None}
    shared = {
        "dtype": config.dtype,
        "negative_prompt": config.negative_prompt or "",
        "prompt_weights": "compel" if config.prompt_weights else "",
        "size_px": "x".join(map(str, conditions.size_px or ())),
        "scheduler_options": config.scheduler_options or "",
        "image": " ".join(digest[:16] for digest in images.values()),
        "image_strength": f"{conditions.image_strength:g}" if config.image else "",
    }
    notes = making_notes(", ".join([Path(source).name for source, _ in named]), base) | {
        "adapter_digest": ", ".join([artefact.digest() for artefact in artefacts]),
        "adapter_scale": ", ".join([str(strength) for _, strength in named]),
    }
    base_notes = making_notes("none", base)
    return Drawing(
        pipe, templates, seeds, token, config.base_token or words.get(token) or token, words, sampling, conditions,
        (notes if named else base_notes) | shared, base_notes | shared, settings,
        dict(_digest(source, artefact) for (source, _), artefact in zip(named, artefacts, strict=True)), images,
    )  # fmt: skip


def _conditions(config: Settings, pipe, sampling: Sampling) -> Conditions:
    """What pictures are drawn with besides prompts and seeds.

    Raises:
        UserError: a picture cannot be used, the base cannot draw such a size, or the sampler refuses its options.
    """
    for name, side in (("resolution", sampling.resolution), ("width", config.width), ("height", config.height)):
        check_drawn_size(pipe, side, name)
    options = read_options(config.scheduler_options, sampling.scheduler, pipe.scheduler)
    check_sampler(sampling.scheduler, pipe.scheduler, options, sampling.num_inference_steps)
    side = sampling.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    picture, mask, size_px = None, None, None
    if config.image is not None:
        asked = (config.width, config.height)
        picture, mask = read_conditions_images(config.image, config.mask_image, side**2, asked, pipe.vae_scale_factor)
        size_px = picture.size
    elif config.width or config.height:
        size_px = (config.width or side, config.height or side)
    strength = config.image_strength
    if strength is None:
        strength = IMAGE_STRENGTH if mask is None else MASK_STRENGTH
    return Conditions(
        config.negative_prompt, size_px, options, picture, mask, strength, prompt_weights=config.prompt_weights
    )


def _base_prompt(own: Drawing, template: str) -> str:
    """A prompt for the base, which knows none of the adapters' words."""
    prompt = fill(template, own.base_token or "")
    for token, word in own.words.items():
        prompt = prompt.replace(token, word)
    return prompt


def _digest(source: str, artefact: Artefact) -> tuple[str, str]:
    """What a picture's text calls an adapter, and its SHA-256; of folders and hub ids that of what they hold."""
    path = Path(source).expanduser()
    if path.is_file():
        return source, sha256_of(path)
    return (source if path.exists() else HUB + source), artefact.digest()


def check_grid(path: Path, overwrite: bool) -> None:
    """Refuses to replace a picture of the grid's name; a grid of the pictures beside it may be made again.

    Raises:
        UserError: it is another picture.
    """
    if path.exists() and not overwrite and GRID_NOTE not in image_notes(path):
        raise UserError(f"{path}: exists and is no grid of `generate`; move it, or pass --overwrite")
