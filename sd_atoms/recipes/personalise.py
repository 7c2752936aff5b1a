"""From a folder of pictures to an adapter, pictures and scores: the job of train_dreambooth_atoms.py."""

import dataclasses
import re
from pathlib import Path

import torch
from accelerate.utils import set_seed
from PIL import Image

from sd_atoms.data.images import check_images, fit, read_image, scan_folder
from sd_atoms.data.prompts import fill, load_templates
from sd_atoms.errors import UserError
from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.evaluation.metrics import diversity, match_share, mean_cosine, paired_cosine
from sd_atoms.files import replacing, write_json
from sd_atoms.generation import Request, Sampling, generate, save_picture
from sd_atoms.pipeline import open_base, save_atoms
from sd_atoms.pipeline.tokens import check_new_token
from sd_atoms.pocket import packaged_path
from sd_atoms.recipes.machine import make_accelerator, on_main
from sd_atoms.recipes.pictures import adapter_notes, draw_missing, read_pictures
from sd_atoms.report.grid import Block, labelled_blocks, picture_grid
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.loop import Outcome, attach, prompts_of, train
from sd_atoms.training.run_folder import ADAPTER, CURVES, IMAGES, LOG, METRICS, check_output, open_run, read_log


def personalise(config: TrainConfig) -> Path:
    """Trains, saves, draws and scores; returns the run folder.

    Raises:
        UserError: something in the settings or the data is wrong; found before anything is written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint is on disk.
    """
    # Everything that can be wrong, before anything is written
    run, name = Path(config.output_dir), concept_name(config)
    accelerator = make_accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        logging_dir=run / CURVES if config.report_to == "tensorboard" else None,
    )
    on_main(accelerator, lambda: check_output(config))
    photos = scan_folder(packaged_path(config.instance_data_dir) or config.instance_data_dir)
    check_images(photos.paths)
    templates = load_templates(config.prompts_file) if config.prompts_file else []
    prompts_of(config)
    scorer = ClipFeatures(config.clip_model_name_or_path) if config.clip_model_name_or_path else None
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    set_seed(config.seed)
    pipe = open_base(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        device=accelerator.device,
    )
    config = dataclasses.replace(config, resolution=training_resolution(config, pipe))
    if config.placeholder_token:
        check_new_token(pipe, config.placeholder_token)
    attach(pipe, config)

    # Train
    if accelerator.is_main_process:
        open_run(config, accelerator.num_processes)
        for note in photos.ignored:
            print(f"Ignored in {config.instance_data_dir}: {note}")
    accelerator.wait_for_everyone()
    if config.report_to == "tensorboard":
        accelerator.init_trackers("")
    sampling = Sampling(config.guidance_scale, config.num_inference_steps, config.scheduler, config.resolution)
    outcome = train(
        config,
        pipe,
        accelerator,
        photos.paths,
        run,
        lambda step: draw_validation(config, pipe, accelerator, sampling, run / IMAGES, step),
    )

    # Save
    about = describe(config, outcome, accelerator.num_processes)
    if accelerator.is_main_process:
        tokens = [config.placeholder_token] if config.placeholder_token else []
        save_atoms(pipe, run / ADAPTER, tokens=tokens, about=about)
        save_atoms(pipe, run / f"{name}.safetensors", tokens=tokens, about=about)

    # Draw
    sets = picture_sets(config, templates)
    anew = config.resume_from_checkpoint is not None  # a run that went on draws otherwise than before
    notes = adapter_notes(f"{name}.safetensors", config.pretrained_model_name_or_path)
    draw_missing(pipe, accelerator, sets["instance"] + sets["prompt"], sampling, run / IMAGES, notes, anew)
    pipe.unet.disable_adapters()
    notes = adapter_notes("none", config.pretrained_model_name_or_path)
    draw_missing(pipe, accelerator, sets["base-instance"] + sets["base-prompt"], sampling, run / IMAGES, notes, anew)
    pipe.unet.enable_adapters()

    # Report
    if accelerator.is_main_process:
        originals = [
            fit(read_image(path), config.resolution, center_crop=True, resample="lanczos", rng=None)
            for path in photos.paths
        ]
        pictures = {kind: read_pictures(run / IMAGES, requests) for kind, requests in sets.items()}
        with replacing(run / IMAGES / "grid.png") as temporary:
            summary_grid(config, originals, pictures, sets).save(temporary, format="PNG")
        metrics = {"training": dataclasses.asdict(outcome) | learning_curve(read_log(run / LOG))}
        if scorer is not None:
            metrics["clip"] = score(scorer, originals, pictures, [request.prompt for request in sets["base-prompt"]])
        write_json(run / METRICS, metrics)
        print_summary(config, run / f"{name}.safetensors", metrics)
    accelerator.end_training()
    return run


def concept_name(config: TrainConfig) -> str:
    """castle for <castle>; without a placeholder the name of the run folder."""
    name = re.sub(r"[^\w-]+", "", config.placeholder_token or "")
    return name or Path(config.output_dir).resolve().name


def training_resolution(config: TrainConfig, pipe) -> int:
    """The side of the training pictures in pixels: as set, or the base's own.

    Raises:
        UserError: the base cannot work at that size.
    """
    side = config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    unit = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if side % unit:
        raise UserError(f"resolution: {side} is not a multiple of {unit}, which this base needs")
    return side


def picture_sets(config: TrainConfig, templates: list[str]) -> dict[str, list[Request]]:
    """What is drawn at the end, by kind: the instance prompt and every template, with the adapter and by the base.

    The base does not know the new word and is asked for its initializer instead.
    """
    concept = config.placeholder_token or config.initializer_token or ""
    word = config.initializer_token or concept
    plain = config.instance_prompt.replace(concept, word) if concept else config.instance_prompt
    prompts = {
        "instance": [config.instance_prompt] * config.num_instance_images,
        "prompt": [fill(template, concept) for template in templates],
        "base-instance": [plain] * config.num_instance_images,
        "base-prompt": [fill(template, word) for template in templates],
    }
    return {
        kind: [Request(prompt, seed, f"{kind}-{seed:02d}") for seed, prompt in enumerate(texts)]
        for kind, texts in prompts.items()
    }


def describe(config: TrainConfig, outcome: Outcome, processes: int) -> dict:
    """What an adapter's header says besides its settings and its base's fingerprint."""
    return {
        "base": config.pretrained_model_name_or_path,
        "tokens": {config.placeholder_token: config.initializer_token} if config.placeholder_token else {},
        "instance_prompt": config.instance_prompt,
        "resolution": config.resolution,
        "sampling": {key: getattr(config, key) for key in ("guidance_scale", "num_inference_steps", "scheduler")},
        "training": {
            "steps": outcome.steps,
            "pictures_per_step": config.train_batch_size * config.gradient_accumulation_steps * processes,
            "learning_rate": config.learning_rate,
            "seed": config.seed,
        },
    }


def draw_validation(config: TrainConfig, pipe, accelerator, sampling: Sampling, folder: Path, step: int) -> None:
    """One row of pictures on the way; they take nothing from the training but time."""
    seeds = range(config.num_validation_images)
    requests = [Request(config.validation_prompt, seed, "") for seed in seeds]
    row = [image for _, image in generate(pipe, requests, sampling, accelerator)]
    if accelerator.is_main_process:
        grid = picture_grid(
            [row], column_labels=[f"seed {seed}" for seed in seeds], title=f"step {step}: {config.validation_prompt}"
        )
        save_picture(folder / f"validation-{step:06d}.png", grid, {"prompt": config.validation_prompt, "step": step})


def summary_grid(
    config: TrainConfig,
    photos: list[Image.Image],
    pictures: dict[str, list[Image.Image]],
    requests: dict[str, list[Request]],
) -> Image.Image:
    """The picture of a run: photos, the instance prompt without and with the adapter, every template with it."""
    columns, shown = 5, 10
    blocks = [
        Block("Your pictures", photos[:shown]),
        Block(f"The base: {requests['base-instance'][0].prompt}", pictures["base-instance"][:columns]),
        Block(f"With the adapter: {config.instance_prompt}", pictures["instance"][:shown]),
    ]
    if pictures["prompt"]:
        captions = [request.prompt for request in requests["prompt"]]
        blocks.append(Block("With the adapter, where it never stood", pictures["prompt"], captions))
    return labelled_blocks(blocks, columns, title=config.placeholder_token)


def score(
    scorer: ClipFeatures, photos: list[Image.Image], pictures: dict[str, list[Image.Image]], texts: list[str]
) -> dict[str, dict[str, float]]:
    """CLIP scores of the adapter beside the base's, on the same prompts and seeds.

    image: mean cosine of instance pictures and photos. diversity: mean 1 − cosine between instance pictures.
    text: mean cosine of each template picture and its prompt, with the initializer for the concept, since the judge
    does not know the new word. match: share of template pictures whose best prompt of all is their own.
    """
    photo_features = scorer.of_images(photos)
    scores = {}
    for who, prefix in (("adapted", ""), ("base", "base-")):
        features = scorer.of_images(pictures[f"{prefix}instance"])
        scores[who] = {"image": mean_cosine(features, photo_features)}
        if len(features) > 1:
            scores[who]["diversity"] = diversity(features)
        if texts:
            features, text_features = scorer.of_images(pictures[f"{prefix}prompt"]), scorer.of_texts(texts)
            scores[who]["text"] = paired_cosine(features, text_features)
            scores[who]["match"] = match_share(features, text_features)
    return {who: {key: round(value, 4) for key, value in values.items()} for who, values in scores.items()}


def learning_curve(log: list[dict]) -> dict[str, float]:
    """Seconds of all steps, and the mean loss of the first and of the last fifth of them."""
    losses = [entry["loss"] for entry in log]
    fifth = max(1, len(losses) // 5)
    return {
        "seconds": log[-1]["seconds"],
        "first_loss": sum(losses[:fifth]) / fifth,
        "last_loss": sum(losses[-fifth:]) / fifth,
    }


def print_summary(config: TrainConfig, adapter: Path, metrics: dict) -> None:
    """What came out, and what to do with it."""
    run, training = adapter.parent, metrics["training"]
    word = (
        f" and {training['trained_token_numbers']:,} of {config.placeholder_token}"
        if training["trained_token_numbers"]
        else ""
    )
    print(
        f"\nTrained {training['trained_numbers']:,} numbers of atoms{word} in {training['steps']} steps, "
        f"{training['seconds']:.0f} s; loss {training['first_loss']:.3f} -> {training['last_loss']:.3f}."
    )
    if "clip" in metrics:
        adapted, base = metrics["clip"]["adapted"], metrics["clip"]["base"]
        print("\nCLIP                       adapter     base  difference")
        labels = {
            "image": "picture and photos",
            "text": "picture and prompt",
            "match": "right prompt, share",
            "diversity": "diversity",
        }
        for key, label in labels.items():
            if key in adapted:
                print(f"  {label:<22} {adapted[key]:>9.3f} {base[key]:>8.3f} {adapted[key] - base[key]:>+11.3f}")
    concept = config.placeholder_token or config.instance_prompt
    print(
        f"\n{adapter} ({adapter.stat().st_size / 1000:.0f} KB) and {run / IMAGES / 'grid.png'}\n"
        "\nTry next:\n"
        f"  sd-atoms generate --adapter {adapter} --prompts prompts/few_shot.txt --seeds 0-3 --out {run / 'more'}\n"
        f"  tensorboard --logdir {run / CURVES}\n"
        f'  python -c "from sd_atoms.pipeline import open_base, load_atoms; '
        f"pipe = open_base('{config.pretrained_model_name_or_path}'); load_atoms(pipe, '{adapter}'); "
        f"pipe('{concept} at night', guidance_scale={config.guidance_scale:g}).images[0].save('night.png')\"\n"
    )
