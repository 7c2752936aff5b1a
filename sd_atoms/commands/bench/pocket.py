"""Measures how well a base of the pocket world draws it, beside the world's own renderer."""

from dataclasses import dataclass

from sd_atoms.bench.pocket import bench_pocket, pocket_text
from sd_atoms.commands.bench.common import HOW, WHAT, Common, started, tell
from sd_atoms.files import replacing
from sd_atoms.pipeline.sampling import SAMPLERS, Sampling
from sd_atoms.settings import section, setting


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms bench pocket`."""

    base: str = setting("pocket", WHAT, "pocket, or the folder weights/pocket-sd that pretrain-pocket makes")
    judge: str = setting("pocket:clip", HOW, "CLIP model that matches pictures and prompts")
    seeds: int = setting(8, HOW, "pictures of each of the twenty evaluation prompts", low=1)
    guidance_scale: float = setting(3.0, HOW, "classifier-free guidance", low=0.0)  # as configs/pocket draws
    num_inference_steps: int = setting(Sampling.num_inference_steps, HOW, "denoising steps", low=1)
    scheduler: str = setting("euler_a", HOW, "sampler", choices=SAMPLERS)
    sheet: str | None = setting(None, HOW, "also write a PNG of 40 held-out captions, the renderer's pictures beside")
    common: Common = section(Common)


def run(settings: Settings) -> None:
    """Measures; raises UserError for a value that cannot be used."""
    threads = started(settings.common, sheet=settings.sheet)
    sampling = Sampling(settings.guidance_scale, settings.num_inference_steps, settings.scheduler)
    result, sheet = bench_pocket(settings.base, settings.judge, settings.seeds, sampling, threads)
    tell(pocket_text(result), result, settings.common)
    if settings.sheet:
        with replacing(settings.sheet) as temporary:
            sheet.save(temporary, "PNG")
