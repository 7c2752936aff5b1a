"""Adapts a pretrained classifier to labelled images: a method's parameters and a new head, in one file."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from sd_atoms.classify.config import HEAD_ALONE, ClassifyConfig
from sd_atoms.classify.file import NAME, save_classifier
from sd_atoms.classify.images import LabelledSet, open_set, some_of
from sd_atoms.classify.models import TIMM, Classifier, open_classifier
from sd_atoms.classify.scores import logits_of, scores_of
from sd_atoms.classify.training import adapt, data_digests, train_classifier, trained_counts
from sd_atoms.data.checked import usable
from sd_atoms.data.records import ImageRecord
from sd_atoms.errors import UserError, first_lines
from sd_atoms.files import replacing, write_json
from sd_atoms.machine import on_main, peak_bytes
from sd_atoms.report.classifier import confusion_figure, summary_text
from sd_atoms.report.run import learning_curve
from sd_atoms.sources import public_name
from sd_atoms.training.run_folder import IMAGES, LOG, METRICS, begin, check_data, check_output, prepare, read_log

Settings = ClassifyConfig
MOST_TRAIN_TESTED = 2_000  # training images that the gap between training and test is told with


def run(config: ClassifyConfig) -> Path:
    """Trains, saves and tests; returns the run folder.

    Raises:
        UserError: something in the settings or the data is wrong; found before anything is written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint is on disk.
    """
    if config.plan.dry_run:
        print(plan_text(config))
        return Path(config.output.output_dir)
    folder, seed = Path(config.output.output_dir), config.loop.seed
    config, accelerator, notes = prepare(config)
    if config.output.resume_from_checkpoint is None:
        on_main(accelerator, lambda: check_output(config))  # before all images are read
    torch.backends.cuda.matmul.allow_tf32 = config.precision.allow_tf32
    found, skipped = labelled_images(config, accelerator)
    notes += skipped
    network = config.network
    classifier = opened_classifier(config, len(found.class_names))
    config = adapt(classifier, config)
    on_main(accelerator, lambda: check_output(config))
    digests = data_digests(found)
    notes += on_main(accelerator, lambda: check_data(config.output, digests))
    classifier.to(accelerator.device)

    ready = partial(begin, config, accelerator, notes)
    progress = train_classifier(config, classifier, accelerator, found.train, folder, ready, digests)
    memory, method = peak_bytes(accelerator.device.type), config.method.chosen()
    trained, of_head = trained_counts(classifier)
    told = {"images": len(found.train), "steps": progress.step, "seed": seed, "test_share": config.data.test_share}
    # `prepare` made its forward pass mixed; it is tested as it will be used
    accelerator.unwrap_model(classifier, keep_fp32_wrapper=False)
    if accelerator.is_main_process:
        names = dict(model=told_model(network.model), method=method.name, class_names=found.class_names)
        save_classifier(folder / NAME, classifier, **names, training=told)
    classifier.requires_grad_(False)

    tested = scores_of(logits_of(classifier, found.test, accelerator), labels(found.test), found.class_names)
    some = random.Random(seed).sample(found.train, min(MOST_TRAIN_TESTED, len(found.train)))
    learned = scores_of(logits_of(classifier, some, accelerator), labels(some), found.class_names)
    if accelerator.is_main_process:
        metrics = {
            "training": {
                "method": method.name,
                "trained_numbers": trained,
                "head_numbers": of_head,
                "steps": progress.step,
                "peak_memory_bytes": memory,
                **learning_curve(read_log(folder / LOG)),
            },
            "test": tested,
            "train": {name: learned[name] for name in ("accuracy", "cross_entropy")},
        }
        picture = folder / IMAGES / "confusion.png"
        figure, notes = confusion_figure(tested["confusion"], found.class_names)
        with replacing(picture) as temporary:
            figure.savefig(temporary, format="png")
        write_json(folder / METRICS, metrics)
        known = told_model(network.model) == network.model
        print(summary_text(metrics, folder / NAME, picture, None if known else network.model))
        for note in notes:
            print(note)
    accelerator.end_training()
    return folder


def plan_text(config: ClassifyConfig) -> str:
    """What a run would do, as far as its network and images are here.

    Raises:
        UserError: they are, and cannot be used.
    """
    method, loop, network = config.method.chosen(), config.loop, config.network
    images, classes = None, None
    try:
        found = opened_set(config)
        images, tests = len(found.train), len(found.test)
        images, tests = (
            min(images, config.data.max_train_samples or images),
            min(tests, config.data.max_test_samples or tests),
        )
        classes = len(found.class_names)
        told = f"{images:,} to learn from, {tests:,} to test on, {classes} classes"
    except UserError as error:
        if is_here(config):
            raise  # and wrong
        told = f"not here: {error}"
    try:
        classifier = opened_classifier(config, classes or 2)
    except UserError as error:
        if Path(network.model).expanduser().exists():
            raise
        classifier, of = None, f"not known: {error}"
    if classifier is not None:
        config = adapt(classifier, config)
        trained, of_head = trained_counts(classifier)
        of = f"{trained:,} parameters, {of_head:,} of the head" + ("" if classes else " if there were two classes")
    per_step = loop.train_batch_size * loop.gradient_accumulation_steps
    length = f"{loop.max_train_steps:,} steps" if loop.num_train_epochs is None else f"{loop.num_train_epochs} epochs"
    if images and loop.num_train_epochs is not None:
        length += f", {-(-loop.num_train_epochs * images // per_step):,} steps"
    optimiser = config.optimiser
    rate = optimiser.learning_rate if optimiser.learning_rate is not None else config.usual_rates()["learning_rate"]
    rates = f"{optimiser.head_learning_rate:g} for the head"
    rates = rates if method is HEAD_ALONE else f"{rate:g} for {method.name}, {rates}"
    lines = {
        "network": network.model,
        "images": told,
        "trained": f"{method.name}: {of}",
        "length": f"{length} of {per_step} images in a process",
        "rates": f"{rates}, {optimiser.lr_scheduler}",
        "run folder": config.output.output_dir,
    }
    return "\n".join(f"{name + ':':<12}{text}" for name, text in lines.items())


def opened_classifier(config: ClassifyConfig, classes: int) -> Classifier:
    """The network that the settings name, with a head; raises UserError as `open_classifier` does."""
    network = config.network
    return open_classifier(
        network.model,
        classes,
        size_px=network.size_px,
        normalisation=network.normalisation,
        keep_head=network.keep_head,
        seed=config.loop.seed,
    )


def told_model(name: str) -> str:
    """A network's name without the folders of this machine."""
    return name if name.startswith(TIMM) else public_name(name)


def is_here(config: ClassifyConfig) -> bool:
    """Whether there is something at the place of the images."""
    return Path(config.data.dataset_dir or config.data.data).expanduser().exists()


def opened_set(config: ClassifyConfig) -> LabelledSet:
    """The images that the settings name; raises UserError as `open_set` does."""
    data = config.data
    return open_set(
        data.data,
        dataset_dir=data.dataset_dir,
        test_data=data.test_data,
        test_share=data.test_share,
        seed=config.loop.seed,
    )


def labelled_images(config: ClassifyConfig, accelerator) -> tuple[LabelledSet, list[str]]:
    """The images of a run, checked, and lines on those that were left out; raises UserError as `open_set` does."""
    data, seed = config.data, config.loop.seed
    found = opened_set(config)
    cache = Path(data.cache_dir) if data.cache_dir else None
    sets, notes = [], []
    for records, most, what in (
        (found.train, data.max_train_samples, "train"),
        (found.test, data.max_test_samples, "test"),
    ):
        chosen = some_of(records, most, f"{seed}/{what}")
        good, skipped = usable(chosen, data.on_bad_image, accelerator, cache)
        sets.append(good)
        notes += [f"Skipped: {note}" for note in first_lines(skipped)]
    had, learned = ({record.label for record in records} for records in (found.train, sets[0]))
    lost = [found.class_names[label] for label in sorted(had - learned)]
    if lost:
        raise UserError(f"max_train_samples or on_bad_image: {len(sets[0])} images are left, none of {lost[0]!r}")
    return LabelledSet(*sets, found.class_names), notes


def labels(records: Sequence[ImageRecord]) -> list[int]:
    """Theirs, in order."""
    return [record.label for record in records]
