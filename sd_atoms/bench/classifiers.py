"""Image classifiers with random weights, for `bench step`."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from sd_atoms.bench.methods import FLOOR, NAIVE, put_naive, settings_of
from sd_atoms.classify.config import TARGETS, ClassifyConfig
from sd_atoms.classify.models import Classifier, Preprocessing
from sd_atoms.classify.training import adapt
from sd_atoms.settings import build

# name -> what transformers' AutoConfig makes of it; what is not said is the library's default, which is ResNet50
CLASSIFIERS = {
    "convnext-b": {"model_type": "convnext", "depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]},
    "resnet50": {"model_type": "resnet"},
}
CLASSES = 1000


def build_classifier(config: dict, size_px: int, device: str, dtype: torch.dtype = torch.float32) -> Classifier:
    """A classifier of 1,000 classes with seeded random weights, its head frozen too, for images of `size_px`."""
    torch.manual_seed(0)
    options = {name: value for name, value in config.items() if name != "model_type"}
    made = AutoConfig.for_model(config["model_type"], num_labels=CLASSES, **options)
    network = AutoModelForImageClassification.from_config(made, dtype=dtype).to(device)
    head = next(name for name, layer in reversed(list(network.named_modules())) if type(layer) is nn.Linear)
    return Classifier(network.requires_grad_(False), head, Preprocessing(size_px)).eval()


def attach_to_classifier(classifier: Classifier, method: str) -> list[nn.Parameter]:
    """Puts a method's trainable parameters in as `classify train` does, the head left out; returns them."""
    name, settings = method.partition(":")[0], settings_of(method)
    if name == NAIVE:
        put_naive(classifier.network, TARGETS["atoms"])
    elif name != FLOOR:
        adapt(classifier, build(ClassifyConfig, {"model": "random", "data": "random", "method": name, **settings}))
    classifier.head.requires_grad_(False)
    return [parameter for parameter in classifier.parameters() if parameter.requires_grad]


def classifier_inputs(batch_size: int, resolution_px: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor]:
    """Normalised pixels (N, 3, h, w), seeded normal noise."""
    shape = (batch_size, 3, resolution_px, resolution_px)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype),)
