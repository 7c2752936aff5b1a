"""Pictures from prompts and seeds. Picture (prompt, seed) depends on nothing else: not on its neighbours, nor on how
many processes share the work."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from sd_atoms.errors import UserError
from sd_atoms.files import replacing

_SCHEDULER_CLASSES = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
SCHEDULERS = (*_SCHEDULER_CLASSES, "base")


@dataclass(frozen=True)
class Request:
    """One picture to make: its prompt, its seed and the name it is filed under."""

    prompt: str
    seed: int
    name: str


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn."""

    guidance_scale: float = 7.5  # what Stable Diffusion v1 is usually drawn with
    num_inference_steps: int = 25
    scheduler: str = "ddim"  # deterministic, and the same at any number of steps before it
    resolution: int | None = None  # px; None = the base's own


def generate(
    pipe, requests: Sequence[Request], sampling: Sampling, accelerator=None
) -> Iterator[tuple[Request, Image.Image]]:
    """Draws one picture per request, in order.

    Pictures are drawn one by one: in a batch, the order of sums in a convolution depends on the batch, and a picture
    would differ in its last bits with its neighbours. Each has its own CPU generator, so a card draws the same noise.
    Adapters, train mode, dtype, scheduler and all global random state are as before once the iterator has ended.

    Args:
        pipe: a Stable Diffusion pipeline.
        requests: what to draw.
        sampling: how.
        accelerator: with several processes they share the work, and the main process alone yields; all must iterate.

    Yields:
        (request, RGB picture).
    """
    processes, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    bar = tqdm(total=len(requests), desc="Pictures", unit="picture", disable=None if rank == 0 else True)
    with _drawing(pipe, sampling.scheduler), bar:
        for start in range(0, len(requests), processes):
            share = requests[start : start + processes]
            pictures = [_draw(pipe, share[rank], sampling)] if rank < len(share) else []
            if processes > 1:
                pictures = gather_object(pictures)
            if rank == 0:
                yield from zip(share, pictures, strict=True)
            bar.update(len(share))


def save_picture(path: str | Path, image: Image.Image, notes: Mapping[str, str]) -> None:
    """Writes a PNG whose text chunks say how it was made; all or nothing."""
    text = PngImagePlugin.PngInfo()
    for key, value in notes.items():
        text.add_itxt(key, str(value))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def picture_notes(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG.

    Raises:
        UserError: it is not a whole PNG file.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text may follow the pixels
            return {key: str(value) for key, value in image.text.items()}
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a whole PNG picture ({error}); remove it or pass --overwrite") from error


@torch.no_grad()
def _draw(pipe, request: Request, sampling: Sampling) -> Image.Image:
    return pipe(
        request.prompt,
        height=sampling.resolution,
        width=sampling.resolution,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]


@contextlib.contextmanager
def _drawing(pipe, scheduler: str) -> Iterator[None]:
    """Eval mode and another scheduler for a while."""
    modules = [pipe.unet, pipe.text_encoder, pipe.vae]
    was_training = [module.training for module in modules]
    own_scheduler = pipe.scheduler
    try:
        for module in modules:
            module.eval()
        pipe.scheduler = _SCHEDULER_CLASSES.get(scheduler, type(own_scheduler)).from_config(own_scheduler.config)
        yield
    finally:
        pipe.scheduler = own_scheduler
        for module, training in zip(modules, was_training, strict=True):
            module.train(training)
