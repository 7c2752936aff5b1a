"""Trains a classifier: the adapter and its head, by the loop that all trainings share."""

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from sd_atoms.classify.config import HEAD, HEAD_ALONE, RATES, TARGETS, ClassDataSettings, ClassifyConfig, NoValidation
from sd_atoms.classify.images import LabelledSet
from sd_atoms.classify.models import Classifier, Preprocessing, try_out
from sd_atoms.data.images import to_unit
from sd_atoms.data.records import ImageRecord
from sd_atoms.errors import UserError
from sd_atoms.machine import read_ahead
from sd_atoms.methods import find_budget
from sd_atoms.methods.adapters import add_adapter
from sd_atoms.methods.selective import parameters_of
from sd_atoms.settings import replaced
from sd_atoms.training.checkpoint import Progress
from sd_atoms.training.noise import generator, image_number
from sd_atoms.training.sections import budget_of
from sd_atoms.training.steps import Hooks, run_steps, steps_of
from sd_atoms.tuner import TARGET_SETS, AtomsConfig, named_targets

OWN = {"bitfit": "bias", "norm": "norm", "full": "full"}  # method -> what it trains of a layer
ASPECT = (3 / 4, 4 / 3)  # of a random crop, width to height


def adapt(classifier: Classifier, config: ClassifyConfig) -> ClassifyConfig:
    """Puts the adapter into a classifier; returns the settings with what was left open filled in.

    Raises:
        UserError: the method cannot take these layers, or no size comes near the budget.
    """
    method = config.method.chosen()
    usual = "conv+linear" if config.method.kc else TARGETS.get(method.name, method.default_target)
    target = config.method.target or usual
    left_open = {name: rate for name, rate in config.usual_rates().items() if getattr(config.optimiser, name) is None}
    config = replaced(config, target=target, **left_open)
    if method is HEAD_ALONE:
        return config
    layers = target_layers(classifier, target, method.name)
    # as an expression, since PEFT takes the names of a list for endings: the stem conv1 for every block's conv1 too
    exactly = f"(?:{'|'.join(map(re.escape, layers))})" if isinstance(layers, list) else layers
    settings = config.method.given()
    if config.method.budget is not None:
        budget = budget_of(config.method.budget)
        settings = find_budget(method, classifier.network, budget, settings, exactly).settings
        config = replaced(config, budget=None, **settings)
    head = list(classifier.head.parameters())
    peft = method.make_config(classifier.network, settings | {"seed": config.loop.seed}, exactly)
    if isinstance(peft, AtomsConfig) and peft.solver == "svd" and isinstance(layers, list):
        # K atoms are exact and all that K taps have; pointwise and Linear layers have block atoms or none
        kernels = {name: getattr(classifier.network.get_submodule(name), "kernel_size", (1,)) for name in layers}
        taps = {name: prod(kernel) for name, kernel in kernels.items()}
        peft.m_pattern = {re.escape(name): count for name, count in taps.items() if 1 < count < peft.m}
    torch.manual_seed(config.loop.seed)  # PEFT's tuners draw what they begin with from the global generator
    add_adapter(classifier.network, peft)
    if type(classifier.head) is not nn.Linear:
        raise UserError(f"target: takes in {classifier.head_name}, the head, which is trained whole; leave it out")
    # PEFT's OFT takes the channels-last input of a Linear layer, as in ConvNeXt, for a convolution's
    try_out(classifier, f"method {method.name}: this network, adapted so,")
    for parameter in head:  # PEFT froze it with the base
        parameter.requires_grad_(True)
    return config


def target_layers(classifier: Classifier, target: str | None, method: str) -> list[str] | str | None:
    """The layers that a target means to a method, without the head; an expression stays one.

    Of "all", what modules hold beside their sub-modules (ViT's class token, ConvNeXt's scales) is left out.

    Raises:
        UserError: a named set has no layer here.
    """
    if target == "all" and method in OWN:
        found = [
            name
            for name, module in classifier.network.named_modules()
            if not any(module.children()) and parameters_of(module, OWN[method])
        ]
    elif target in TARGET_SETS:
        try:
            found = named_targets(classifier.network, target)
        except ValueError as error:
            raise UserError(str(error)) from error
    else:
        return target
    found = [name for name in found if name != classifier.head_name]
    if method in OWN:
        found = [name for name in found if parameters_of(classifier.network.get_submodule(name), OWN[method])]
    if not found:
        raise UserError(f"target={target}: the network has no such layer besides its head; --target chooses others")
    return found


def train_classifier(
    config: ClassifyConfig,
    classifier: Classifier,
    accelerator,
    train: Sequence[ImageRecord],
    folder: Path,
    begin: Callable[[], None],
    data: Mapping[str, str],
) -> Progress:
    """Trains what `adapt` made trainable.

    Args:
        config: settings, with learning rates.
        classifier: on the accelerator's device.
        accelerator: made with the config's precision and accumulation.
        train: what to learn from, with labels.
        folder: the run folder.
        begin: as in `Hooks`.
        data: digests of what is learned from.

    Raises:
        UserError: a checkpoint does not fit, or the loss is not finite.
        Interrupted: on Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    seed, device = config.loop.seed, accelerator.device
    preprocessing, smoothing = classifier.preprocessing, config.optimiser.label_smoothing

    def loss_of(network: nn.Module, numbers: range) -> torch.Tensor:
        chosen = [(number, train[image_number(seed, number, len(train))]) for number in numbers]
        images = read_ahead(
            lambda pair: training_image(pair[1].read(), preprocessing, config.data, seed, pair[0]), chosen
        )
        pixels = preprocessing.normalised(to_unit(list(images)).to(device))
        labels = torch.tensor([record.label for _, record in chosen], device=device)
        if config.network.head_dropout:
            kept = head_mask(numbers, classifier.head.in_features, config.network.head_dropout, seed)
            classifier.head_mask = kept.to(device)
        return F.cross_entropy(network(pixels).float(), labels, label_smoothing=smoothing)

    parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    steps = steps_of(config.loop, len(train), accelerator.num_processes)
    optimiser = config.optimiser
    if optimiser.lr_warmup_epochs is not None:
        per_epoch = len(train) / (
            config.loop.train_batch_size * config.loop.gradient_accumulation_steps * accelerator.num_processes
        )
        optimiser = replaced(optimiser, lr_warmup_steps=min(steps, round(optimiser.lr_warmup_epochs * per_epoch)))
    classifier.train()
    progress = run_steps(
        classifier,
        loss_of,
        rate_groups(parameters, classifier, config),
        accelerator,
        folder,
        examples=len(train),
        loop=config.loop,
        optimiser=optimiser,
        validation=NoValidation(),
        output=config.output,
        hooks=Hooks(begin, lambda: ({}, {}), dict, lambda step: None),
        data=data,
    )
    classifier.eval()
    classifier.head_mask = None
    return progress


def head_mask(numbers: Iterable[int], features: int, dropout: float, seed: int) -> torch.Tensor:
    """(samples, features): 0 at a chance of `dropout`, else 1 / (1 − dropout), by each sample's number alone."""
    rows = [torch.rand(features, generator=generator(seed, "dropout", number)) >= dropout for number in numbers]
    return torch.stack(rows) / (1 - dropout)


def rate_groups(parameters: Mapping[str, nn.Parameter], classifier: Classifier, config: ClassifyConfig) -> list[dict]:
    """The trained parameters by learning rate: the head, β, the rest of the adapter by kind."""
    method, optimiser = config.method.chosen(), config.optimiser
    head = {id(parameter) for parameter in classifier.head.parameters()}
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        kind = HEAD if id(parameter) in head else method.kind(name)
        groups.setdefault("main" if kind in method.main_kinds and kind != HEAD else kind, []).append(parameter)
    rates = {**method.rates, **RATES, "main": optimiser.learning_rate, "beta": optimiser.beta_learning_rate}
    rates[HEAD] = optimiser.head_learning_rate
    return [{"params": members, "lr": rates[kind]} for kind, members in groups.items()]


def data_digests(found: LabelledSet) -> dict[str, str]:
    """What is learned from, for checkpoints: the images with their labels, and the classes."""
    content = hashlib.sha256()
    for record in found.train:
        content.update(f"{record.digest()} {record.label}\n".encode())
    return {"labelled images": content.hexdigest()[:16], "classes": "\n".join(found.class_names)}


def trained_counts(classifier: Classifier) -> tuple[int, int]:
    """How many parameters are trained in the network, and in its head."""
    head = sum(parameter.numel() for parameter in classifier.head.parameters())
    total = sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
    return total - head, head


def training_image(
    image: Image.Image, preprocessing: Preprocessing, data: ClassDataSettings, seed: int, number: int
) -> Image.Image:
    """Sample `number`'s view of an image, which depends on the seed and the number alone."""
    rng = random.Random(f"{seed}/crop/{number}")
    if data.crop_scale < 1:
        image = image.crop(random_box(image.size, data.crop_scale, rng))
        side = preprocessing.size_px
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    else:
        image = centre_crop(image, preprocessing)
    flipped = rng.random() < 0.5
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if data.random_flip and flipped else image


def random_box(size: tuple[int, int], smallest: float, rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop whose area is a share from `smallest` to 1, of an aspect within ASPECT; the
    middle, of such an aspect, where ten draws do not fit in.
    """
    width, height = size
    for _ in range(10):
        area, aspect = width * height * rng.uniform(smallest, 1), np.exp(rng.uniform(*np.log(ASPECT)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])  # as much of the middle as such an aspect takes
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The middle of an image, after its shorter side was made size_px / crop_share."""
    side = preprocessing.size_px
    short = round(side / preprocessing.crop_share)
    factor = short / min(image.size)
    if factor != 1:
        size = tuple(max(short, round(length * factor)) for length in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
