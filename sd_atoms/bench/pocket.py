"""`bench pocket`: how well a base of the pocket world draws that world, beside its own renderer."""

import random
from collections.abc import Sequence

import torch
from PIL import Image

from sd_atoms.bench.measuring import describe, machine_info
from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.evaluation.intervals import share_figure
from sd_atoms.generation import Request, generate
from sd_atoms.pipeline import open_base
from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.pocket.pretrain.stages import ImagesSettings
from sd_atoms.pocket.world import EVALUATION_PROMPTS, Scene, caption, render, sample
from sd_atoms.pocket.world.scenes import LIGHTS, STONE_COLOURS, VIVID_COLOURS
from sd_atoms.progress import followed
from sd_atoms.report.grid import Block, labelled_blocks
from sd_atoms.report.table import text_table

LANDMARKS = ("castle", "canal")
HELD_OUT = 40
SHEET_COLUMNS = 8


def bench_pocket(base: str, judge: str, seeds: int, sampling: Sampling, threads: int) -> tuple[dict, Image.Image]:
    """Match shares of a base and of the renderer, and a sheet.

    Match share: of the pictures of the twenty evaluation prompts, with any castle or any canal in them, those whose
    best of the twenty prompts is their own, `seeds` pictures to each; and the same of HELD_OUT captions of scenes that
    no training picture shows, one picture each, which the sheet shows beside the renderer's.

    Args:
        base: "pocket" or a pipeline's folder.
        judge: a CLIP model.
        seeds: pictures of each prompt.
        sampling: how the base draws.
        threads: for torch.

    Raises:
        UserError: base or judge cannot be opened.
    """
    torch.set_num_threads(threads)
    pipe, clip = open_base(base), ClipFeatures(judge)
    shares = {}
    for landmark in LANDMARKS:
        prompts = [template.format(landmark) for template, *_ in EVALUATION_PROMPTS]
        scenes = [_scene(landmark, number, seed) for seed in range(seeds) for number in range(len(prompts))]
        requests = [Request(prompt, seed, "") for seed in range(seeds) for prompt in prompts]
        pictures = {"base": _drawn(pipe, requests, sampling), "renderer": _rendered(scenes)}
        shares[landmark] = {who: _match(clip, own, prompts) for who, own in pictures.items()}
    scenes = [sample(random.Random(ImagesSettings.first_held_out_seed + number)) for number in range(HELD_OUT)]
    captions = [caption(scene, random.Random(number)) for number, scene in enumerate(scenes)]
    requests = [Request(text, number, "") for number, text in enumerate(captions)]
    pictures = {"base": _drawn(pipe, requests, sampling), "renderer": _rendered(scenes)}
    shares["held_out"] = {who: _match(clip, own, captions) for who, own in pictures.items()}
    pairs = [picture for pair in zip(*pictures.values(), strict=True) for picture in pair]
    texts = [text for own in captions for text in (own, "the renderer")]
    sheet = labelled_blocks([Block("", pairs, texts)], SHEET_COLUMNS)
    drawn = {name: getattr(sampling, name) for name in ("guidance_scale", "num_inference_steps", "scheduler")}
    settings = {"base": base, "judge": judge, "seeds": seeds, **drawn}
    result = {"benchmark": "pocket", "settings": settings, "machine": machine_info("cpu", threads), "match": shares}
    return result, sheet


def pocket_text(result: dict) -> str:
    """The result as a table."""
    rows = []
    for name, found in result["match"].items():
        base, renderer = found["base"], found["renderer"]
        interval = f"{base['low']:.3f} to {base['high']:.3f}"
        rows.append((name, f"{base['value']:.3f}", interval, f"{renderer['value']:.3f}", f"{base['n']}"))
    table = text_table(("match share", "base", "95 %", "renderer", "pictures"), rows)
    settings = result["settings"]
    return f"{describe(result['machine'])}\n{settings['base']}, judged by {settings['judge']}\n{table}"


def _scene(landmark: str, number: int, seed: int) -> Scene:
    """A landmark never trained on, as an evaluation prompt asks for it."""
    rng = random.Random(ImagesSettings.first_held_out_seed + 1000 * seed + number)
    _, setting, special, companion = EVALUATION_PROMPTS[number]
    return Scene(
        landmark=landmark,
        landmark_seed=rng.randrange(1 << 30),
        colour=rng.choice((*STONE_COLOURS, *VIVID_COLOURS)),
        setting=setting,
        companion=companion,
        special=special,
        seed=rng.randrange(1 << 30),
        light=rng.choice(LIGHTS),
    )


def _drawn(pipe, requests: Sequence[Request], sampling: Sampling) -> list[Image.Image]:
    return [picture for _, picture in generate(pipe, requests, sampling)]


def _rendered(scenes: Sequence[Scene]) -> list[Image.Image]:
    return [render(scene) for scene in followed(scenes, len(scenes), "Rendering", "picture")]


def _match(clip: ClipFeatures, pictures: Sequence[Image.Image], prompts: list[str]) -> dict:
    """`pictures` come in rounds of one per prompt."""
    best = (clip.of_images(list(pictures)) @ clip.of_texts(prompts).T).argmax(1)
    own = torch.arange(len(pictures)) % len(prompts)
    return share_figure(best.eq(own)).entries()
