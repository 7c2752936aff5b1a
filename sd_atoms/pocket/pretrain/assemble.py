"""Stage "assemble": puts the trained parts into a pipeline, a CLIP and a judge folder, with a manifest."""

import json
import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer, ResNetModel
from transformers.utils import logging

from sd_atoms.files import write_json
from sd_atoms.pocket.manifest import MANIFEST_NAME, file_entries
from sd_atoms.pocket.pretrain import finished_path
from sd_atoms.pocket.pretrain.stages import STAGES, AssembleSettings
from sd_atoms.pocket.pretrain.unet import NOISE_SCHEDULE
from sd_atoms.pocket.world import PICTURE_PX


def run(work_dir: Path, settings: AssembleSettings, state: PartialState) -> dict:
    """Writes `work_dir`/weights: pocket-sd, pocket-clip, pocket-judge if it is made, and manifest.json, in one go."""
    if not state.is_main_process:
        return {}
    unfinished, weights = work_dir / ".weights-unfinished", work_dir / "weights"
    for folder in (unfinished, weights):
        if folder.exists():
            shutil.rmtree(folder)
    assemble_pipeline(work_dir, unfinished / "pocket-sd")
    assemble_clip(work_dir, unfinished / "pocket-clip")
    if finished_path(work_dir, "judge").exists():
        assemble_judge(work_dir, unfinished / "pocket-judge")
    for path in unfinished.rglob("*.safetensors"):
        store_as(path, getattr(torch, settings.storage_dtype))
    files = file_entries(unfinished)
    write_json(unfinished / MANIFEST_NAME, {"files": files, "stages": finished_stages(work_dir)})
    unfinished.rename(weights)
    return {"bytes": sum(entry["bytes"] for entry in files.values())}


def assemble_pipeline(work_dir: Path, folder: Path) -> None:
    """A StableDiffusionPipeline with Stable Diffusion v1's scheduler."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work_dir / "vae"),
        text_encoder=load_text_encoder(work_dir / "clip"),
        tokenizer=CLIPTokenizer.from_pretrained(work_dir / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work_dir / "unet"),
        scheduler=PNDMScheduler(
            **NOISE_SCHEDULE,
            prediction_type=STAGES["unet"].settings.prediction_type,
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    copy_classic_tokenizer(work_dir, folder / "tokenizer")
    for part in ("vae", "unet"):
        edit_json(folder / part / "config.json", _name_or_path=None)  # would name a folder of this machine
    # PNDM does not know clip_sample; schedulers made from this one do, and must not clip latents.
    edit_json(folder / "scheduler" / "scheduler_config.json", clip_sample=False)


def load_text_encoder(clip_folder: Path) -> CLIPTextModel:
    """The text tower of a CLIPModel, without the long report that the image tower is left over."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return CLIPTextModel.from_pretrained(clip_folder)
    finally:
        logging.set_verbosity(verbosity)


def assemble_clip(work_dir: Path, folder: Path) -> None:
    """A CLIPModel with its tokenizer and image processor."""
    CLIPModel.from_pretrained(work_dir / "clip").save_pretrained(folder)
    CLIPTokenizer.from_pretrained(work_dir / "tokenizer").save_pretrained(folder)
    copy_classic_tokenizer(work_dir, folder)
    save_image_processor(folder)


def assemble_judge(work_dir: Path, folder: Path) -> None:
    """A ResNetModel, whose pooled output are the features, with its image processor."""
    ResNetModel.from_pretrained(work_dir / "judge").save_pretrained(folder)
    save_image_processor(folder)


def save_image_processor(folder: Path) -> None:
    crop = {"height": PICTURE_PX, "width": PICTURE_PX}
    CLIPImageProcessor(size={"shortest_edge": PICTURE_PX}, crop_size=crop).save_pretrained(folder)


def copy_classic_tokenizer(work_dir: Path, folder: Path) -> None:
    """Adds the two files that older versions of transformers read."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(work_dir / "tokenizer" / name, folder / name)


def store_as(path: Path, dtype: torch.dtype) -> None:
    """Rewrites a weight file in another precision; its config keeps float32, so that it loads as float32."""
    tensors = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **fields: object) -> None:
    """Sets fields of a JSON file; None removes a field."""
    config = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    for name, value in fields.items():
        if value is None:
            del config[name]
    write_json(path, config)


def finished_stages(work_dir: Path) -> dict[str, dict]:
    """How each earlier stage was made, as it recorded it."""
    paths = {name: finished_path(work_dir, name) for name in STAGES if name != "assemble"}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
