"""The generated images of a run on an image set, and their scores against its test split."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sd_atoms.data.checked import usable
from sd_atoms.data.concepts import find_images
from sd_atoms.data.labelled import task_images
from sd_atoms.data.records import ImageRecord, image_record
from sd_atoms.data.vtab import Task
from sd_atoms.evaluation.classes import Probe, class_coverage
from sd_atoms.evaluation.folder import Draws, score_images
from sd_atoms.evaluation.intervals import mean_figure
from sd_atoms.evaluation.networks import Network, features_of, open_network
from sd_atoms.evaluation.run import RESIZE
from sd_atoms.generation import Request, generate_missing
from sd_atoms.jobs.drawing import CACHE, Pictures, open_for_drawing, run_entry
from sd_atoms.jobs.plan import Run
from sd_atoms.jobs.results import DRAWN
from sd_atoms.jobs.sets import SetExperiment, SetPlan
from sd_atoms.training.config import TrainConfig

SEEDS = 2**40  # below those of class pictures and of training; no seed that people type is meant
DRAWS = Draws()
T = TypeVar("T")


def draw_set(plan: SetPlan, run: Run, config: TrainConfig, reference: Sequence[ImageRecord], accelerator) -> Pictures:
    """Draws what the run's folder lacks.

    Raises:
        UserError: images of these names were made otherwise, or the adapter does not fit.
    """
    pipe, sampling, notes, digests = open_for_drawing(plan, run, config, accelerator.device)
    requests, labels = set_requests(plan.task(run), plan.experiment, reference)
    folder, together = plan.run_folder(run) / DRAWN, config.images.generation_batch_size
    generate_missing(pipe, accelerator, requests, sampling, folder, notes, batch_size=together)
    return Pictures(requests, sampling, digests, labels=labels)


def set_requests(
    task: Task, experiment: SetExperiment, reference: Sequence[ImageRecord]
) -> tuple[list[Request], list[int] | None]:
    """What is drawn of a set, and the labels: image i of a prompt has a seed of its own, whatever else is drawn."""
    if not task.names_classes:
        names = [f"{number:05d}" for number in range(experiment.images)]
        return [Request(task.prompt, seed_of(task.prompt, n), name) for n, name in enumerate(names)], None
    sizes = Counter(image.label for image in reference)
    weights = [1 if experiment.per_class == "equal" else sizes[label] for label in range(task.classes)]
    requests, labels = [], []
    for label, (prompt, count) in enumerate(zip(task.prompts, shares(experiment.images, weights), strict=True)):
        requests += [Request(prompt, seed_of(prompt, n), f"{label:03d}-{n:05d}") for n in range(count)]
        labels += [label] * count
    return requests, labels


def seed_of(prompt: str, number: int) -> int:
    """The seed of an image: of its prompt and its number alone, so that more images never change those there are."""
    return int.from_bytes(hashlib.blake2b(f"{prompt}/{number}".encode(), digest_size=8).digest(), "big") % SEEDS


def shares(count: int, weights: Sequence[int]) -> list[int]:
    """`count` divided in proportion to the weights; what is left over goes to the largest remainders."""
    whole = [count * weight // sum(weights) for weight in weights]
    remainders = [count * weight % sum(weights) for weight in weights]
    for place in sorted(range(len(weights)), key=lambda place: -remainders[place])[: count - sum(whole)]:
        whole[place] += 1
    return whole


def reference_of(plan: SetPlan, run: Run) -> list[ImageRecord]:
    """The images of the test split that a run is scored against, not read yet; raises as `task_images`."""
    data, most = plan.config(run).data, plan.experiment.reference_images
    columns = dict(image_column=data.image_column, label_column=data.label_column)
    found = task_images(plan.task(run), plan.experiment.data_dir, "test", **columns)
    return found if most is None else spread(found, most)


def spread(items: Sequence[T], most: int) -> list[T]:
    """All of them, or so many, spread over them."""
    return list(items) if len(items) <= most else [items[n * len(items) // most] for n in range(most)]


def score_set(
    plan: SetPlan, run: Run, config: TrainConfig, generated: Pictures, reference: Sequence[ImageRecord], accelerator
) -> dict[str, Any]:
    """What scores.json holds: who made the images, by what they are scored, and the scores.

    Raises:
        UserError: a network cannot be opened, or an image not be read.
    """
    folder, cache, task = plan.run_folder(run) / DRAWN, plan.folder / CACHE, plan.task(run)
    real, _ = usable(reference, config.data.on_bad_image, accelerator, cache)
    (source,), _ = find_images(replace(config.data, cache_dir=str(cache)), config.all_concepts, accelerator)
    made, _ = usable([image_record(folder / f"{own.name}.png") for own in generated.requests], "error", accelerator)
    networks = [open_network(name, accelerator.device, RESIZE) for name in plan.networks]
    found = {}
    for network in networks:
        found[network.name] = _scores(network, made, generated.labels, real, source.images, task, plan.metrics, cache,
                                      accelerator)  # fmt: skip
    more = {
        "reference": hashlib.sha256("".join(image.digest() for image in real).encode()).hexdigest(),
        "reference_images": len(real),
    }
    names = [request.name for request in generated.requests]
    said = run_entry(plan, run, config, generated, networks, more)
    return said | {"labels": generated.labels, "images": names, "networks": found}


def _scores(
    network: Network,
    made: Sequence[ImageRecord],
    labels: Sequence[int] | None,
    real: Sequence[ImageRecord],
    train: Sequence[ImageRecord],
    task: Task,
    groups: Sequence[str],
    cache: Path,
    accelerator,
) -> dict[str, Any]:
    """Figures, notes and coverage by class, by one network."""
    features, reference = (features_of(network, own, RESIZE, cache, accelerator) for own in (made, real))
    scores = score_images(features, reference, None, None, groups, DRAWS)
    of_real = [image.label for image in real]
    coverage = {}
    if "prdc" in groups:
        try:
            coverage = class_coverage(reference, of_real, features, labels)
        except ValueError as error:
            scores.notes.append(f"coverage by class: {error}")
    if labels is not None:
        learned = features_of(network, train, RESIZE, cache, accelerator)
        probe = Probe(learned, [image.label for image in train], task.classes)
        for name, pair in {"accuracy": (features, labels), "accuracy_real": (reference, of_real)}.items():
            scores.figures[name] = mean_figure(probe.right(*pair), DRAWS.number, DRAWS.seed)
    figures = {name: figure.entries() for name, figure in scores.figures.items()}
    return {"figures": figures, "notes": scores.notes, "coverage_by_class": coverage}
