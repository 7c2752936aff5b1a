"""A trained classifier without its adapter: merged into the network, as a folder of transformers or an ONNX file."""

from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from transformers import CLIPImageProcessor

from sd_atoms.classify.models import Classifier
from sd_atoms.errors import UserError
from sd_atoms.files import replacing
from sd_atoms.methods.adapters import merge_adapters

OPSET = 18


def merged(classifier: Classifier) -> Classifier:
    """The same classifier, changed in place: adapters added to the weights in float32 and taken out."""
    merge_adapters(classifier.network)
    for name, module in list(classifier.network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            classifier.network.set_submodule(name, module.get_base_layer())
    return classifier.eval()


def save_plain(folder: Path, classifier: Classifier, class_names: tuple[str, ...]) -> None:
    """A merged classifier of transformers as a folder that its own pipelines open, with a processor that makes images
    ready as the training did.

    Raises:
        UserError: it is none of transformers, or the folder cannot be written.
    """
    network = classifier.network
    if not hasattr(network, "save_pretrained"):
        raise UserError("out: only classifiers of transformers become a folder; write an ONNX file")
    network.config.id2label = dict(enumerate(class_names))
    network.config.label2id = {name: label for label, name in enumerate(class_names)}
    vars(network).pop("peft_config", None)
    network._hf_peft_config_loaded = False
    own = classifier.preprocessing
    processor = CLIPImageProcessor(  # resizes the shorter side, crops the middle, normalises
        size={"shortest_edge": round(own.size_px / own.crop_share)},
        crop_size={"height": own.size_px, "width": own.size_px},
        resample=Image.Resampling.BICUBIC,
        image_mean=list(own.mean),
        image_std=list(own.std),
    )
    try:
        network.save_pretrained(folder)
        processor.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error


def write_onnx(path: Path, classifier: Classifier) -> float:
    """Writes a merged classifier as ONNX, normalised pixels (N, 3, h, w) to logits, N free; reads it back.

    Returns:
        The largest difference of onnxruntime's logits from torch's, over images of noise.

    Raises:
        UserError: onnx or onnxruntime is not installed, or the file cannot be written.
    """
    try:
        import onnx  # noqa: F401 (torch's exporter needs it)
        import onnxruntime
    except ImportError as error:
        raise UserError('onnx needs `pip install "sd-atoms[onnx]"`') from error
    side = classifier.preprocessing.size_px
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    names = dict(input_names=["pixels"], output_names=["logits"])
    free = {"pixels": {0: "images"}, "logits": {0: "images"}}
    with replacing(path) as temporary:
        torch.onnx.export(
            classifier,
            (pixels,),
            str(temporary),
            opset_version=OPSET,
            dynamo=False,
            dynamic_axes=free,
            **names,
        )
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        found = session.run(None, {"pixels": torch.cat([pixels, -pixels[:1]]).numpy()})[0]
    with torch.no_grad():
        expected = classifier(torch.cat([pixels, -pixels[:1]]))
    return float((torch.from_numpy(found) - expected).abs().max())
