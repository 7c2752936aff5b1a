"""What `generate` and `again` draw: their settings, and all that these come to."""

import dataclasses
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sd_atoms.data.images import read_image
from sd_atoms.data.prompts import check_lengths, fill, load_templates, parse_seeds
from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.generation import Conditions, making_notes
from sd_atoms.generation.conditions import IMAGE_STRENGTH, MASK_STRENGTH, check_conditions, read_conditions_images
from sd_atoms.generation.record import HUB, sha256_of
from sd_atoms.generation.weights import plain_texts
from sd_atoms.pipeline import DTYPES, Artefact, open_base
from sd_atoms.pipeline.header import Header, find_base, find_base_config, parse_header
from sd_atoms.pipeline.sampling import SAMPLERS, Sampling, check_sampler, read_options
from sd_atoms.pipeline.sizes import check_drawn_size
from sd_atoms.pipeline.together import load_together, split_strength
from sd_atoms.settings import setting, unmet_needs
from sd_atoms.training.adapter import open_adapter

MODEL, WHAT, HOW, START = "model", "what to draw", "how to draw it", "start from a picture"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms generate`. What is left out comes from the header of the first adapter that has one."""

    adapter: tuple[str, ...] = setting(
        (),
        MODEL,
        "run or adapter folder, one .safetensors file, LoRA files of other programs too, a run's checkpoint, or hub "
        "id; PATH=0.8 sets its strength, and the flag may come several times; without any, --base draws alone",
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
    dtype: str = setting("fp32", MODEL, "precision of the weights", choices=tuple(DTYPES))

    prompt: tuple[str, ...] = setting(
        (), WHAT, "a prompt, {} for the concept if you like; the flag may come several times", many=True
    )
    prompts: str | None = setting(
        None,
        WHAT,
        "besides --prompt or in its place: text file, one per line, with {} or a word of the adapters, or few_shot",
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
        f"share of the steps that are drawn on it; none = {IMAGE_STRENGTH:g}, with a mask {MASK_STRENGTH:g}",
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
        None, HOW, "side in pixels of a square picture; image is scaled to the same area; none = as in training",
        low=32, high=4096,
    )  # fmt: skip
    width: int | None = setting(None, HOW, "in pixels; none = as resolution says", low=32, high=4096)
    height: int | None = setting(None, HOW, "in pixels; none = as resolution says", low=32, high=4096)
    generation_batch_size: int = setting(1, HOW, "pictures a process draws at once; may change last bits", low=1)


@dataclass(frozen=True)
class Adapters:
    """What is drawn with. leading: the header of the first that names its base. words: token -> what it started from.
    files: name -> SHA-256."""

    sources: list[str]
    strengths: list[float]
    artefacts: list[Artefact]
    leading: Header
    base: str
    base_config: str | None
    words: dict[str, str]
    files: dict[str, str]


@dataclass(frozen=True)
class Drawing:
    """All that settings come to. templates: prompts with {} open, for which `token` stands, or `base_token` for the
    base. notes: of every picture, or of every one by the base alone. settings: the same with nothing left open.
    images: name -> SHA-256 of the pictures that are read."""

    pipe: Any
    adapters: Adapters
    templates: list[str]
    seeds: list[int]
    token: str
    base_token: str
    sampling: Sampling
    conditions: Conditions
    notes: dict[str, str]
    base_notes: dict[str, str]
    settings: Settings
    images: dict[str, str]


def prepare(config: Settings, device: torch.device) -> Drawing:
    """Reads adapters, prompts and pictures, and opens the pipeline.

    Raises:
        UserError: something in the settings is wrong; nothing is written.
    """
    unmet = unmet_needs(config)
    if unmet:
        raise UserError("; ".join(unmet))
    seeds, adapters = parse_seeds(config.seeds), read_adapters(config)
    token = config.token or next(iter(adapters.words), None)
    templates = [*config.prompt]
    if config.prompts:
        templates += load_templates(config.prompts, adapters.words, plain=token is None)
    if token is None and any("{}" in template for template in templates):
        raise UserError(f"token is required: {[*adapters.sources, adapters.base][0]} brings no word of its own")
    token = token or ""

    pipe = open_base(
        adapters.base,
        revision=config.revision,
        variant=config.variant,
        base_config=adapters.base_config,
        inpainting=True,
        dtype=DTYPES[config.dtype],
        device=device,
    )
    chosen = {
        key: getattr(config, key) for key in ("guidance_scale", "num_inference_steps", "scheduler", "resolution")
    }
    chosen = {key: value for key, value in chosen.items() if value is not None}
    sampling = dataclasses.replace(adapters.leading.sampling, **chosen)
    conditions = _conditions(config, pipe, sampling)
    check_conditions(pipe, sampling, conditions)
    load_together(pipe, adapters.artefacts, adapters.strengths)
    texts = [fill(template, token) for template in templates]
    texts += [config.negative_prompt] if config.negative_prompt else []
    check_lengths(pipe.tokenizer, plain_texts(pipe, texts) if config.prompt_weights else texts)
    _note_unknown_words(pipe, texts, adapters.words)

    images = {name: sha256_of(name) for name in (config.image, config.mask_image) if name is not None}
    base_notes = making_notes("none", adapters.base) | _condition_notes(config, conditions, images)
    notes = base_notes
    if adapters.sources:
        notes = base_notes | {
            "adapter": ", ".join(Path(source).name for source in adapters.sources),
            "adapter_digest": ", ".join(artefact.digest() for artefact in adapters.artefacts),
            "adapter_scale": ", ".join(map(str, adapters.strengths)),
        }
    return Drawing(
        pipe=pipe,
        adapters=adapters,
        templates=templates,
        seeds=seeds,
        token=token,
        base_token=config.base_token or adapters.words.get(token) or adapters.leading.tokens.get(token) or token,
        sampling=sampling,
        conditions=conditions,
        notes=notes,
        base_notes=base_notes,
        settings=_settled(config, adapters, sampling, conditions),
        images=images,
    )


def _note_unknown_words(pipe, texts: Sequence[str], known: Collection[str]) -> None:
    """Warns of words such as <castel> that the pipeline reads letter by letter."""
    vocabulary = pipe.tokenizer.get_vocab()
    words = dict.fromkeys(word for text in texts for word in re.findall(r"<[^<>\s]+>", text))
    for word in words:
        if word not in vocabulary:
            there = f"they bring {', '.join(known)}" if known else "there are none"
            warnings.warn(f"{word}: is no word of the adapters, {there}", AtomsWarning, stacklevel=3)


def read_adapters(config: Settings) -> Adapters:
    """The adapters of the settings, each at its strength, and the base that they are for.

    Raises:
        UserError: one cannot be read, has no strength where one is set, or the base cannot be told.
    """
    named = [split_strength(text, config.adapter_scale) for text in config.adapter]
    base, base_config = config.pretrained_model_name_or_path, config.base_config
    artefacts = [open_adapter(source, base, base_config) for source, _ in named]
    headers, files = [], {}
    for (source, strength), artefact in zip(named, artefacts, strict=True):
        headers.append(parse_header(source, artefact.about))
        path = Path(source).expanduser()
        # of folders and hub ids the digest is that of what they hold
        digest = sha256_of(path) if path.is_file() else artefact.digest()
        files[source if path.exists() else HUB + source] = digest
        if strength != 1 and artefact.config is None and artefact.text_config is None:
            raise UserError(f"adapter_scale={strength:g}: {source} has tokens alone, which have no strength")
    first = next((number for number, header in enumerate(headers) if header.base is not None), 0)
    leading = headers[first] if headers else Header()
    if named:
        base = find_base(base, named[first][0], leading)
        base_config = find_base_config(base_config, named[first][0], base)
    words = {
        token: header.tokens.get(token) or token
        for artefact, header in zip(artefacts, headers, strict=True)
        for token in artefact.tokens
    }
    sources, strengths = [source for source, _ in named], [strength for _, strength in named]
    return Adapters(sources, strengths, artefacts, leading, base, base_config, words, files)


def _settled(config: Settings, adapters: Adapters, sampling: Sampling, conditions: Conditions) -> Settings:
    """The settings of one picture with nothing left to a header, a default or a file of prompts."""
    width, height = conditions.size_px or (None, None)
    return dataclasses.replace(
        config,
        adapter=tuple(f"{s}={strength!r}" for s, strength in zip(adapters.sources, adapters.strengths, strict=True)),
        adapter_scale=1.0,
        pretrained_model_name_or_path=adapters.base,
        base_config=adapters.base_config,
        prompts=None,
        token=None,
        base_token=None,
        compare_base=False,
        overwrite=False,
        width=width,
        height=height,
        image_strength=conditions.image_strength if config.image else None,
        generation_batch_size=1,
        **dataclasses.asdict(sampling),
    )


def _condition_notes(config: Settings, conditions: Conditions, images: Mapping[str, str]) -> dict[str, str]:
    """What else tells pictures apart; empty where it was not asked for."""
    return {
        "dtype": config.dtype,
        "negative_prompt": config.negative_prompt or "",
        "prompt_weights": "compel" if config.prompt_weights else "",
        "size_px": "x".join(map(str, conditions.size_px or ())),
        "scheduler_options": config.scheduler_options or "",
        "image": " ".join(digest[:16] for digest in images.values()),
        "image_strength": f"{conditions.image_strength:g}" if config.image else "",
    }


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
        areas = (side**2, side**2 if config.resolution else 2 * side**2)
        picture, mask = read_conditions_images(config.image, config.mask_image, areas, asked, pipe.vae_scale_factor)
        size_px = picture.size
        if (own_px := read_image(config.image).size) != size_px and os.environ.get("RANK", "0") == "0":
            note = "{} x {} px, is drawn at {} x {}".format(*own_px, *size_px)
            print(f"{config.image}, {note}; width and height, or resolution, say otherwise")
    elif config.width or config.height:
        size_px = (config.width or side, config.height or side)
    strength = config.image_strength
    if strength is None:
        strength = IMAGE_STRENGTH if mask is None else MASK_STRENGTH
    return Conditions(
        config.negative_prompt, size_px, options, picture, mask, strength, prompt_weights=config.prompt_weights
    )
