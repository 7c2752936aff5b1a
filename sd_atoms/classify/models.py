"""Pretrained image classifiers by name, with a new head: of transformers, of timm, and efficientnet-lite0."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from sd_atoms.errors import UserError
from sd_atoms.evaluation.efficientnet import NAME as EFFICIENTNET
from sd_atoms.evaluation.efficientnet import SIDE_PX, load_efficientnet
from sd_atoms.methods.adapters import one_line
from sd_atoms.pipeline.base import quiet_unless_terminal
from sd_atoms.pipeline.fingerprint import fingerprint
from sd_atoms.sources import resolve_source
from sd_atoms.training.noise import generator

TIMM = "timm:"
HEAD_DEVIATION = 0.01  # of a new head's weights: small, so that the first steps are the head's
NORMALISATIONS = {
    "model": None,  # as its own processor has it
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class Preprocessing:
    """From an RGB image to what the network takes.

    size_px: side of the square. crop_share: the image is first made so that its shorter side is size_px / crop_share.
    mean, std: pixels in [0, 1] become (x − mean) / std.
    """

    size_px: int
    crop_share: float = 1.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, h, w) in [0, 1] -> what the network takes."""
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std


class Classifier(nn.Module):
    """Normalised pixels (N, 3, h, w) -> logits (N, classes).

    network: what adapters go into, in eval mode always: statistics of its batch norms stay the pretrained ones, so
    that a reloaded classifier says the very same. head: within `network`, trained whole. mark: fingerprint of its
    weights, the head aside, before any adapter. head_mask: (N, features), what the head's input is multiplied by in
    training; None for nothing.
    """

    def __init__(self, network: nn.Module, head: str, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network, self.head_name, self.preprocessing = network, head, preprocessing
        self.mark: torch.Tensor | None = None
        self.head_mask: torch.Tensor | None = None
        self.head.register_forward_pre_hook(self._masked)

    def _masked(self, head: nn.Module, inputs: tuple) -> tuple:
        masked = self.training and self.head_mask is not None
        return (inputs[0] * self.head_mask, *inputs[1:]) if masked else inputs

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return self.network.get_submodule(self.head_name)

    def train(self, mode: bool = True) -> "Classifier":
        """As usual, but the network stays in eval mode."""
        self.training = mode
        self.network.eval()
        return self

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found = self.network(pixels)
        return found if isinstance(found, torch.Tensor) else found.logits


class _Lite0(nn.Module):
    """EfficientNet-Lite0 behind the usual (x − ½) / ½."""

    def __init__(self) -> None:
        super().__init__()
        self.body = load_efficientnet()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.body.classify((pixels + 1) * 127.5)


def open_classifier(
    name: str,
    classes: int,
    *,
    size_px: int | None = None,
    normalisation: str = "model",
    keep_head: bool = False,
    seed: int = 0,
) -> Classifier:
    """A pretrained network, frozen but for its head.

    Args:
        name: a folder or hub id of transformers (facebook/convnext-base-224-22k), timm:NAME, or efficientnet-lite0.
        classes: how many the new head tells apart.
        size_px: side of the images; None for the model's own.
        normalisation: a key of NORMALISATIONS.
        keep_head: keep the pretrained head, which must have that many classes.
        seed: of the new head.

    Raises:
        UserError: there is no such model, or it is no classifier; one line.
    """
    quiet_unless_terminal()
    if name == EFFICIENTNET:
        network, head, own = _Lite0(), "body.classifier", Preprocessing(SIDE_PX, 0.875)
    elif name.startswith(TIMM):
        network, head, own = _of_timm(name)
    else:
        network, head, own = _of_transformers(name, keep_head)
    mean_std = NORMALISATIONS[normalisation]
    if mean_std is not None:
        own = Preprocessing(own.size_px, own.crop_share, *mean_std)
    own = own if size_px is None else Preprocessing(size_px, own.crop_share, own.mean, own.std)
    network.requires_grad_(False)
    before = network.get_submodule(head)
    if keep_head and before.out_features != classes:
        raise UserError(f"keep_head: {name} has {before.out_features} classes, the data {classes}")
    if not keep_head:
        network.set_submodule(head, _new_head(before.in_features, classes, seed))
    classifier = Classifier(network, head, own).eval()
    classifier.head.requires_grad_(True)
    weights = {name: parameter for name, parameter in network.named_parameters() if not name.startswith(f"{head}.")}
    classifier.mark = fingerprint(weight for weight in weights.values() if weight.dim() > 1)
    try_out(classifier, f"model: {name!r}")
    return classifier


def _of_transformers(name: str, keep_head: bool) -> tuple[nn.Module, str, Preprocessing]:
    source = str(resolve_source(name, "model"))
    try:
        architectures = AutoConfig.from_pretrained(source).architectures or []
        model, found = AutoModelForImageClassification.from_pretrained(
            source, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # the libraries raise whatever they trip over
        raise UserError(
            f"model: {name!r} cannot be opened as an image classifier of transformers ({one_line(error)})"
        ) from error
    try:
        own = _preprocessing(AutoImageProcessor.from_pretrained(source, backend="pil"))
    except Exception as error:  # likewise
        raise UserError(
            f"model: {name!r} says not how images are made ready: its preprocessor_config.json, as "
            f"AutoImageProcessor writes it, is missing or another kind ({one_line(error)})"
        ) from error
    head = _last_linear(model)
    missing = [key for key in found["missing_keys"] if not key.startswith(head)]
    if missing:
        kind = ", ".join(architectures) or "unknown"
        raise UserError(f"model: {name!r} ({kind}) lacks {len(missing)} weights of a classifier, such as {missing[0]}")
    if keep_head and found["missing_keys"]:
        raise UserError(f"keep_head: {name!r} comes without a head for its classes")
    return model, head, own


def _of_timm(name: str) -> tuple[nn.Module, str, Preprocessing]:
    try:
        import timm
    except ImportError as error:
        raise UserError(f'model: {name} needs `pip install "sd-atoms[timm]"`') from error
    try:
        model = timm.create_model(name.removeprefix(TIMM), pretrained=True)
        config = timm.data.resolve_model_data_config(model)
    except Exception as error:  # as above
        raise UserError(f"model: {name!r} cannot be opened ({one_line(error)})") from error
    own = Preprocessing(config["input_size"][-1], config["crop_pct"], tuple(config["mean"]), tuple(config["std"]))
    return model, _last_linear(model), own


def _preprocessing(processor) -> Preprocessing:
    """As an image processor of transformers says."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    side = size.get("height") or size.get("shortest_edge")
    share = getattr(processor, "crop_pct", None)
    if share is None:
        share = side / processor.size["shortest_edge"] if "shortest_edge" in processor.size else 1.0
    return Preprocessing(side, min(share, 1.0), tuple(processor.image_mean), tuple(processor.image_std))


def _last_linear(model: nn.Module) -> str:
    found = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if not found:
        raise UserError(f"model: {type(model).__name__} has no Linear layer at its end to put a head in the place of")
    return found[-1]


def _new_head(features: int, classes: int, seed: int) -> nn.Linear:
    head = nn.Linear(features, classes)
    with torch.no_grad():
        head.weight.normal_(std=HEAD_DEVIATION, generator=generator(seed, "head", 0))
        head.bias.zero_()
    return head


@torch.no_grad()
def try_out(classifier: Classifier, what: str) -> None:
    """One image of zeros through the network; raises UserError, which begins with `what`, if it cannot take it."""
    side, weight = classifier.preprocessing.size_px, classifier.head.weight
    try:
        logits = classifier(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))
    except (RuntimeError, ValueError) as error:  # transformers refuse some sizes themselves
        raise UserError(f"{what} cannot take images of {side} px ({str(error).splitlines()[0]})") from error
    if logits.shape != (1, classifier.head.out_features):
        raise UserError(f"{what} does not end in one row of logits: {tuple(logits.shape)}")
