"""From folders of pictures to an adapter, pictures and scores: the job of train_dreambooth_atoms.py."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import set_seed
from PIL import Image

from sd_atoms.data.images import fit
from sd_atoms.data.pictures import folder_pictures, picture_of, table_pictures, usable
from sd_atoms.data.prompts import fill, load_templates
from sd_atoms.errors import UserError
from sd_atoms.evaluation.clip import ClipFeatures
from sd_atoms.evaluation.metrics import diversity, match_share, mean_cosine, paired_cosine
from sd_atoms.files import replacing, write_json
from sd_atoms.generation import Request, Sampling, generate, save_picture
from sd_atoms.pipeline import open_base, save_atoms
from sd_atoms.pipeline.tokens import check_new_token
from sd_atoms.pocket import packaged_path
from sd_atoms.recipes.class_images import class_image_paths
from sd_atoms.recipes.doctor import preflight
from sd_atoms.recipes.machine import make_accelerator, on_main, precision_here
from sd_atoms.recipes.pictures import adapter_notes, draw_missing, read_pictures
from sd_atoms.recipes.share import check_repo_id, own_repo_id, push, write_share_folder
from sd_atoms.report.grid import Block, labelled_blocks, picture_grid
from sd_atoms.training.config import Concept, TrainConfig
from sd_atoms.training.dataset import Source, class_prompts, make_dataset, picture_prompts
from sd_atoms.training.loop import Outcome, attach, train
from sd_atoms.training.objective import noising
from sd_atoms.training.optimiser import with_rates
from sd_atoms.training.run_folder import ADAPTER, CURVES, IMAGES, LOG, METRICS, check_output, open_run, read_log

MOST_SCORED = 100  # training pictures that scores and the grid compare with


def personalise(config: TrainConfig) -> Path:
    """Trains, saves, draws and scores; returns the run folder.

    Raises:
        UserError: something in the settings or the data is wrong; found before anything is written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint is on disk.
    """
    # Everything that can be wrong, before anything is written
    config = dataclasses.replace(with_rates(config), mixed_precision=precision_here(config.mixed_precision))
    run, name = Path(config.output_dir), run_name(config)
    accelerator = make_accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        logging_dir=run / CURVES if config.report_to == "tensorboard" else None,
    )
    on_main(accelerator, lambda: check_output(config))
    repo_id = on_main(accelerator, lambda: hub_id(config)) if config.push_to_hub else None
    sources, notes = find_pictures(config)
    templates = load_templates(config.prompts_file) if config.prompts_file else []
    for source in sources:
        picture_prompts(source)
        if config.prior == "teacher":
            class_prompts(config, source.concept)
    scorer = ClipFeatures(config.clip_model_name_or_path) if config.clip_model_name_or_path else None
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    set_seed(config.seed)
    pipe = open_base(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        device=accelerator.device,
    )
    unit_px = size_unit(pipe)
    config = dataclasses.replace(config, resolution=training_resolution(config, pipe, unit_px))
    noising(pipe.scheduler, config.prediction_type, config.rescale_betas_zero_snr)
    tokens = [token for concept in config.all_concepts for token in concept.tokens]
    for token in tokens:
        check_new_token(pipe, token, tokens)
    notes += on_main(accelerator, lambda: preflight(config, sources, pipe, accelerator.num_processes))
    sampling = Sampling(config.guidance_scale, config.num_inference_steps, config.scheduler, config.resolution)
    if config.prior == "images":
        sources = [with_class_pictures(config, pipe, accelerator, source, sampling) for source in sources]
    attach(pipe, config)
    dataset = make_dataset(pipe, config, sources, unit_px)

    # Train
    def begin():
        if accelerator.is_main_process:
            open_run(config, accelerator.num_processes)
            for note in notes:
                print(note)
        accelerator.wait_for_everyone()
        if config.report_to == "tensorboard":
            accelerator.init_trackers("")

    outcome = train(
        config,
        pipe,
        accelerator,
        dataset,
        run,
        begin,
        lambda step: draw_validation(config, pipe, accelerator, sampling, run / IMAGES, step),
    )

    # Save
    about = describe(config, outcome, accelerator.num_processes, sum(len(source.pictures) for source in sources))
    if accelerator.is_main_process:
        save_atoms(pipe, run / ADAPTER, tokens=tokens, about=about)
        save_atoms(pipe, run / f"{name}.safetensors", tokens=tokens, about=about)

    # Draw
    sets = [picture_sets(config, concept, templates) for concept in config.all_concepts]
    anew = config.resume_from_checkpoint is not None  # a run that went on draws otherwise than before
    base = config.pretrained_model_name_or_path
    requests = [request for own in sets for kind in ("instance", "prompt") for request in own[kind]]
    draw_missing(pipe, accelerator, requests, sampling, run / IMAGES, adapter_notes(f"{name}.safetensors", base), anew)
    requests = [request for own in sets for kind in ("base-instance", "base-prompt") for request in own[kind]]
    with base_alone(pipe):
        draw_missing(pipe, accelerator, requests, sampling, run / IMAGES, adapter_notes("none", base), anew)

    # Report
    if accelerator.is_main_process:
        scores = {}
        for source, own in zip(sources, sets, strict=True):
            originals = [
                fit(picture.read(), config.resolution, center_crop=True, resample="lanczos", rng=None)
                for picture in source.pictures[:MOST_SCORED]
            ]
            pictures = {kind: read_pictures(run / IMAGES, requests) for kind, requests in own.items()}
            with replacing(run / IMAGES / f"{prefix(config, source.concept)}grid.png") as temporary:
                summary_grid(source.concept, originals, pictures, own).save(temporary, format="PNG")
            if scorer is not None:
                texts = [request.prompt for request in own["base-prompt"]]
                scores[concept_name(source.concept, run)] = score(scorer, originals, pictures, texts)
        metrics = {"training": dataclasses.asdict(outcome) | learning_curve(read_log(run / LOG))}
        if scores:
            metrics["clip"] = mean_scores(list(scores.values()))
            if len(scores) > 1:
                metrics["clip_by_concept"] = scores
        write_json(run / METRICS, metrics)
        print_summary(config, run / f"{name}.safetensors", metrics)
        if repo_id is not None:
            print(f"Shared at {push(write_share_folder(run, repo_id), repo_id, config.hub_private_repo)}")
    accelerator.end_training()
    return run


def hub_id(config: TrainConfig) -> str:
    """Where the adapter is to be uploaded; asked before hours of training, not after them."""
    return check_repo_id(config.hub_model_id) if config.hub_model_id else own_repo_id(Path(config.output_dir))


def find_pictures(config: TrainConfig) -> tuple[list[Source], list[str]]:
    """The pictures of every concept, all of them read once to see that they can be, and what there is to say of them.

    Raises:
        UserError: a folder or data set cannot be used, or pictures in it cannot.
    """
    sources, notes = [], []
    for concept in config.all_concepts:
        if config.dataset_name:
            place, ignored = config.dataset_name, ()
            found = table_pictures(
                config.dataset_name,
                config=config.dataset_config_name,
                split=config.dataset_split,
                image_column=config.image_column,
                caption_column=config.caption_column,
                most=config.max_train_samples,
            )
        else:
            place = concept.instance_data_dir
            found, ignored = folder_pictures(packaged_path(place) or place, config.captions)
            if config.captions and found[0].caption is None:
                raise UserError(f"captions: {place} holds neither NAME.txt files of its pictures nor metadata.jsonl")
        found, left_out = usable(found, config.on_bad_image)
        notes += [f"Ignored in {place}: {note}" for note in ignored] + [f"Skipped: {note}" for note in left_out]
        sources.append(Source(concept, found))
    return sources, notes


def with_class_pictures(config: TrainConfig, pipe, accelerator, source: Source, sampling: Sampling) -> Source:
    """The same concept with pictures of its class, the missing ones drawn by the base."""
    paths = class_image_paths(
        pipe,
        accelerator,
        Path(source.concept.class_data_dir),
        source.concept.class_prompt,
        config.num_class_images,
        sampling,
        config.seed,
        config.pretrained_model_name_or_path,
    )
    return dataclasses.replace(source, class_pictures=[picture_of(path) for path in paths])


def concept_name(concept: Concept, run: Path) -> str:
    """castle for <castle>; without a placeholder the name of the run folder."""
    return re.sub(r"[^\w-]+", "", (concept.tokens or ("",))[0]) or run.resolve().name


def run_name(config: TrainConfig) -> str:
    """What the adapter's file is called: castle for <castle>, castle_canal for two concepts."""
    return "_".join(dict.fromkeys(concept_name(concept, Path(config.output_dir)) for concept in config.all_concepts))


def prefix(config: TrainConfig, concept: Concept) -> str:
    """What the names of a concept's pictures begin with, where there are several concepts."""
    return f"{concept_name(concept, Path(config.output_dir))}-" if len(config.all_concepts) > 1 else ""


def size_unit(pipe) -> int:
    """What the sides of a base's pictures are multiples of, in pixels."""
    return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)


def training_resolution(config: TrainConfig, pipe, unit_px: int) -> int:
    """The side of the training pictures in pixels: as set, or the base's own.

    Raises:
        UserError: the base cannot work at that size.
    """
    side = config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    if side % unit_px:
        raise UserError(f"resolution: {side} is not a multiple of {unit_px}, which this base needs")
    return side


def picture_sets(config: TrainConfig, concept: Concept, templates: list[str]) -> dict[str, list[Request]]:
    """What is drawn at the end, by kind: the instance prompt and every template, with the adapter and by the base.

    The base does not know the new word and is asked for its initializer instead.
    """
    plain = concept.instance_prompt
    if concept.word:
        plain = plain.replace(concept.word, concept.plain_word)
    for token, word in zip(concept.tokens, concept.initializers, strict=True):
        plain = plain.replace(token, word)
    prompts = {
        "instance": [concept.instance_prompt] * config.num_instance_images,
        "prompt": [fill(template, concept.word) for template in templates],
        "base-instance": [plain] * config.num_instance_images,
        "base-prompt": [fill(template, concept.plain_word) for template in templates],
    }
    before = prefix(config, concept)
    return {
        kind: [Request(prompt, seed, f"{before}{kind}-{seed:02d}") for seed, prompt in enumerate(texts)]
        for kind, texts in prompts.items()
    }


def describe(config: TrainConfig, outcome: Outcome, processes: int, pictures: int) -> dict:
    """What an adapter's header says besides its settings and its base's fingerprint."""
    return {
        "base": config.pretrained_model_name_or_path,
        "tokens": {
            token: word
            for concept in config.all_concepts
            for token, word in zip(concept.tokens, concept.initializers, strict=True)
        },
        "instance_prompt": config.all_concepts[0].instance_prompt,
        "resolution": config.resolution,
        "sampling": {key: getattr(config, key) for key in ("guidance_scale", "num_inference_steps", "scheduler")},
        "training": {
            "pictures": pictures,
            "steps": outcome.steps,
            "pictures_per_step": config.train_batch_size * config.gradient_accumulation_steps * processes,
            "learning_rate": config.learning_rate,
            "seed": config.seed,
        },
    }


@contextlib.contextmanager
def base_alone(pipe) -> Iterator[None]:
    """Draws without any adapter for a while."""
    pipe.disable_lora()
    try:
        yield
    finally:
        pipe.enable_lora()


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
    concept: Concept,
    photos: list[Image.Image],
    pictures: dict[str, list[Image.Image]],
    requests: dict[str, list[Request]],
) -> Image.Image:
    """The picture of a run: photos, the instance prompt without and with the adapter, every template with it."""
    columns, shown = 5, 10
    blocks = [
        Block("Your pictures", photos[:shown]),
        Block(f"The base: {requests['base-instance'][0].prompt}", pictures["base-instance"][:columns]),
        Block(f"With the adapter: {concept.instance_prompt}", pictures["instance"][:shown]),
    ]
    if pictures["prompt"]:
        captions = [request.prompt for request in requests["prompt"]]
        blocks.append(Block("With the adapter, where it never stood", pictures["prompt"], captions))
    return labelled_blocks(blocks, columns, title=concept.placeholder_token)


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


def mean_scores(scores: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Scores of several concepts as those of one."""
    return {
        who: {key: round(sum(own[who][key] for own in scores) / len(scores), 4) for key in scores[0][who]}
        for who in scores[0]
    }


def learning_curve(log: list[dict]) -> dict[str, float]:
    """Seconds of all steps, and the mean loss of the first and of the last fifth of them, if there is a log."""
    losses = [entry["loss"] for entry in log]
    if not losses:  # somebody removed the log of a finished run
        return {"seconds": 0.0}
    fifth = max(1, len(losses) // 5)
    return {
        "seconds": log[-1]["seconds"],
        "first_loss": sum(losses[:fifth]) / fifth,
        "last_loss": sum(losses[-fifth:]) / fifth,
    }


def print_summary(config: TrainConfig, adapter: Path, metrics: dict) -> None:
    """What came out, and what to do with it."""
    run, training = adapter.parent, metrics["training"]
    words = " ".join(token for concept in config.all_concepts for token in concept.tokens)
    parts = [f"{training['trained_numbers']:,} numbers of atoms"]
    if training["trained_token_numbers"]:
        parts.append(f"{training['trained_token_numbers']:,} of {words}")
    if training["trained_text_numbers"]:
        parts.append(f"{training['trained_text_numbers']:,} of the text encoder")
    curve = ""
    if "last_loss" in training:
        curve = f"; loss {training['first_loss']:.3f} -> {training['last_loss']:.3f}"
    print(f"\nTrained {' and '.join(parts)} in {training['steps']} steps, {training['seconds']:.0f} s{curve}.")
    if training["kept_step"]:
        print(f"Kept step {training['kept_step']}, of the lowest validation loss.")
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
    concept = config.all_concepts[0].word or config.all_concepts[0].instance_prompt
    grid = run / IMAGES / f"{prefix(config, config.all_concepts[0])}grid.png"
    print(
        f"\n{adapter} ({adapter.stat().st_size / 1000:.0f} KB) and {grid}\n"
        "\nTry next:\n"
        f"  sd-atoms generate --adapter {adapter} --prompts prompts/few_shot.txt --seeds 0-3 --out {run / 'more'}\n"
        f"  tensorboard --logdir {run / CURVES}\n"
        f'  python -c "from sd_atoms.pipeline import open_base, load_atoms; '
        f"pipe = open_base('{config.pretrained_model_name_or_path}'); load_atoms(pipe, '{adapter}'); "
        f"pipe('{concept} at night', guidance_scale={config.guidance_scale:g}).images[0].save('night.png')\"\n"
    )
