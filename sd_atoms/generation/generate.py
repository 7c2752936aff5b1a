"""Images from prompts and seeds. Image (prompt, seed) depends on nothing else: not on how many processes share the
work, and on its neighbours in its last bits only where several are drawn together."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image

from sd_atoms.generation.conditions import Conditions, call_settings, keep_outside, pipeline_for
from sd_atoms.generation.weights import weighted_states
from sd_atoms.machine import check_finite
from sd_atoms.pipeline.sampling import Sampling, make_scheduler
from sd_atoms.progress import progress_bar


@dataclass(frozen=True)
class Request:
    """One image to make: its prompt, its seed and the name it is filed under."""

    prompt: str
    seed: int
    name: str


def generate(
    pipe,
    requests: Sequence[Request],
    sampling: Sampling,
    accelerator=None,
    batch_size: int = 1,
    conditions: Conditions = Conditions(),
) -> Iterator[tuple[Request, Image.Image]]:
    """Draws one picture per request, in order.

    Each has its own CPU generator, so a card draws the same noise, whatever its neighbours are. Adapters, train mode,
    dtype, scheduler and all global random state are as before once the iterator has ended.

    Args:
        pipe: a Stable Diffusion pipeline.
        requests: what to draw.
        sampling: how.
        accelerator: with several processes they share the work, and the main process alone yields; all must iterate.
        batch_size: how many a process draws together. One by one, a picture is the same bit for bit in any company; in
            a batch, the order of sums in a convolution depends on the batch, and last bits with it.
        conditions: what else they are drawn with.

    Yields:
        (request, RGB picture).
    """
    processes, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    bar = progress_bar(len(requests), "Pictures", "picture", main=rank == 0)
    with _prepared(pipe, sampling.scheduler, conditions) as drawing, bar:
        for start in range(0, len(requests), processes * batch_size):
            share = requests[start : start + processes * batch_size]
            own = share[rank * batch_size : (rank + 1) * batch_size]
            pictures = _generate_together(drawing, own, sampling, conditions) if own else []
            if processes > 1:
                pictures = gather_object(pictures)
            if rank == 0:
                yield from zip(share, pictures, strict=True)
            bar.update(len(share))


def drawn_together(index: int, count: int, processes: int, batch_size: int) -> tuple[int, int]:
    """How many pictures a process draws at once with number `index` of `count`, and which of them it is, from 0."""
    share = processes * batch_size
    start = index // share * share + index % share // batch_size * batch_size
    return min(batch_size, count - start), index - start


@torch.no_grad()
def _generate_together(pipe, requests: Sequence[Request], sampling: Sampling, conditions: Conditions):
    """The RGB pictures of requests that are drawn as one batch."""
    if hasattr(pipe.scheduler, "noise_sampler_seed"):
        pipe.scheduler.noise_sampler_seed = [request.seed for request in requests]
    images = pipe(
        **_texts(pipe, requests, conditions),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        output_type="pt",
        **call_settings(conditions, sampling, len(requests), pipe.vae_scale_factor),
    ).images  # (n, 3, H, W) in [0, 1]
    why = "the base, or the adapter in it, is broken, or its autoencoder overflows in half precision: try dtype fp32"
    for request, image in zip(requests, images, strict=True):
        check_finite(image, f"the pixels of {request.prompt!r}, seed {request.seed},", why)
    processor = pipe.image_processor
    return keep_outside(processor.numpy_to_pil(processor.pt_to_numpy(images)), conditions)


def _texts(pipe, requests: Sequence[Request], conditions: Conditions) -> dict[str, Any]:
    """Prompts as the pipeline takes them."""
    prompts = [request.prompt for request in requests]
    if conditions.prompt_weights:
        return weighted_states(pipe, prompts, conditions.negative_prompt)
    if conditions.negative_prompt is None:
        return dict(prompt=prompts)
    return dict(prompt=prompts, negative_prompt=[conditions.negative_prompt] * len(prompts))


@contextlib.contextmanager
def _prepared(pipe, scheduler: str, conditions: Conditions) -> Iterator[Any]:
    """The pipeline that draws under these conditions; eval mode and another scheduler for a while."""
    modules = [pipe.unet, pipe.text_encoder, pipe.vae]
    was_training = [module.training for module in modules]
    own_scheduler = pipe.scheduler
    try:
        for module in modules:
            module.eval()
        pipe.scheduler = make_scheduler(scheduler, own_scheduler, conditions.scheduler_options)
        with pipeline_for(pipe, conditions) as drawing:
            yield drawing
    finally:
        pipe.scheduler = own_scheduler
        for module, training in zip(modules, was_training, strict=True):
            module.train(training)
