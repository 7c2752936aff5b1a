"""A trained classifier as one safetensors file: the adapter, its head, the names of the classes, how images are made
ready, and the fingerprint of the network that it belongs to.

    adapter.<PEFT's key>, head.weight (classes, d), head.bias (classes,)

The header entry "sd_atoms_classifier" is a JSON object: format, model, method, config (of the adapter, with its
layers), class_names, preprocessing, fingerprint (by layer of the network), training.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sd_atoms.classify.config import TestedSettings
from sd_atoms.classify.images import LabelledSet, open_set, test_images
from sd_atoms.classify.models import Classifier, Preprocessing, open_classifier
from sd_atoms.errors import UserError
from sd_atoms.files import parse_json, replacing
from sd_atoms.methods.adapters import add_adapter
from sd_atoms.methods.method import adapter_shapes
from sd_atoms.pipeline.artefact_files import CLASSIFIER, CLASSIFIER_FILE
from sd_atoms.pipeline.config import kept_settings, peft_config
from sd_atoms.pipeline.fingerprint import SAME_BASE, distance, from_text, to_text
from sd_atoms.pipeline.inspection import mode_of, trained_numbers
from sd_atoms.training.run_folder import METRICS

HEADER, FORMAT, NAME = CLASSIFIER, 1, CLASSIFIER_FILE
ADAPTER_KEYS, HEAD_KEYS = "adapter.", "head."


@dataclass(frozen=True)
class ClassifierFile:
    """A classifier at rest.

    state: PEFT's key -> numbers, empty of a head alone. head: weight (classes, d), bias (classes,).
    """

    model: str
    method: str
    config: PeftConfig | None
    state: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    fingerprint: torch.Tensor
    training: Mapping[str, Any] = field(default_factory=dict)


def save_classifier(
    path: Path, classifier: Classifier, *, model: str, method: str, class_names: tuple[str, ...], training: Mapping
) -> Path:
    """Writes an adapted classifier, whole or not at all. A head is most of such a file, as a rule.

    Raises:
        UserError: the place cannot be written to, or the disk is full.
    """
    network = classifier.network
    config = getattr(network, "peft_config", {}).get("default")
    state, settings = {}, None
    if config is not None:
        state = get_peft_model_state_dict(network, adapter_name="default", save_embedding_layers=False)
        settings = kept_settings(config)
        targets = config.target_modules
        settings["target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    tensors = {f"{ADAPTER_KEYS}{key}": value for key, value in state.items()}
    tensors |= {f"{HEAD_KEYS}{key}": value for key, value in classifier.head.state_dict().items()}
    about = {
        "format": FORMAT,
        "model": model,
        "method": method,
        "config": settings,
        "class_names": list(class_names),
        "preprocessing": asdict(classifier.preprocessing),
        "fingerprint": to_text(classifier.mark),
        "training": dict(training),
    }
    with replacing(path) as temporary:
        ready = {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
        save_file(ready, temporary, metadata={"format": "pt", HEADER: json.dumps(about, ensure_ascii=False)})
    return path


def read_classifier(path: str | Path) -> ClassifierFile:
    """Reads such a file; a run folder stands for the one in it.

    Raises:
        UserError: there is none, it is a pickle, or it is corrupt.
    """
    path = Path(path).expanduser()
    path = path / NAME if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: no such file; a run folder of `classify train`, or the file in it, is needed")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: only .safetensors files are read; pickles (.bin, .pt, .pth, .ckpt) can run code")
    try:
        with safe_open(path, "pt") as file:
            about = parse_json((file.metadata() or {}).get(HEADER, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: missing, corrupt or not a safetensors file ({error})") from error
    if about is None:
        raise UserError(f"{path}: is no classifier of sd_atoms (no {HEADER!r} entry in its header)")
    try:
        if about["format"] > FORMAT:
            raise UserError(f"{path}: written in a newer format than {FORMAT}; update sd-atoms")
        head = {key: tensors[f"{HEAD_KEYS}{key}"] for key in ("weight", "bias")}
        names, made = tuple(about["class_names"]), Preprocessing(**about["preprocessing"])
        if not all(isinstance(name, str) for name in names) or head["weight"].shape[0] != len(names):
            raise ValueError(f"{len(names)} class names for a head {tuple(head['weight'].shape)}")
        if head["bias"].shape != (len(names),) or not isinstance(about["model"], str):
            raise ValueError("its head")
        made = Preprocessing(
            int(made.size_px), float(made.crop_share), tuple(map(float, made.mean)), tuple(map(float, made.std))
        )
        if not (1 <= made.size_px <= 4096 and 0 < made.crop_share <= 1):
            raise ValueError(f"images of {made.size_px} px, {made.crop_share} of their side")
        if not (len(made.mean) == len(made.std) == 3 and min(made.std) > 0):
            raise ValueError("the normalisation of its images")
        training = about.get("training") or {}
        if type(training.get("seed", 0)) is not int or not 0 < float(training.get("test_share", 0.2)) < 1:
            raise ValueError("what its training says")
        mark, method = from_text(about["fingerprint"]), str(about["method"])
        state = {key.removeprefix(ADAPTER_KEYS): v for key, v in tensors.items() if key.startswith(ADAPTER_KEYS)}
        settings = about["config"]
        if (settings is None) != (not state):
            raise ValueError("an adapter without settings, or settings without an adapter")
        config = None
        if settings is not None:
            config = peft_config(f"{path}: its header", settings)
            config.target_modules = settings["target_modules"]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: corrupt, its header and its tensors do not fit ({error})") from error
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(f"{path}: {len(broken)} of its tensors are not finite ({broken[0]})")
    return ClassifierFile(about["model"], method, config, state, head, names, made, mark, training)


def describe_classifier(path: Path) -> dict[str, Any]:
    """Says what a classifier is, without its network.

    Returns:
        `file`, `bytes`, `kind`, `model`, `method`; `mode` of its adapter in a few words and `trained_numbers` of it,
        None and 0 of a head alone; `head_numbers`, `class_names`, `preprocessing`, `training`; `accuracy` (value, n,
        low, high) on the test images, of the metrics.json of the same run beside it, None without one.

    Raises:
        UserError: as `read_classifier`.
    """
    file = read_classifier(path)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "kind": "classifier",
        "model": file.model,
        "method": file.method,
        "mode": None if file.config is None else mode_of(file.config, file.state),
        "trained_numbers": trained_numbers(file.config, file.state),
        "head_numbers": sum(value.numel() for value in file.head.values()),
        "class_names": list(file.class_names),
        "preprocessing": asdict(file.preprocessing),
        "training": dict(file.training),
        "accuracy": _accuracy(path.parent / METRICS, file),
    }


def _accuracy(path: Path, file: ClassifierFile) -> dict[str, Any] | None:
    """What a run ended with, if it is the one that a file is of."""
    try:
        metrics = parse_json(path.read_text(encoding="utf-8"))
        same = metrics["training"]["steps"] == file.training["steps"]
        same = same and list(metrics["test"]["by_class"]) == list(file.class_names)
        return metrics["test"]["accuracy"] if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_classifier(path: str | Path, model: str | None = None) -> tuple[Classifier, ClassifierFile]:
    """Opens the network that a file belongs to, and puts its adapter and head in.

    Args:
        path: the file, or its run folder.
        model: where the network is, if not where the file says.

    Raises:
        UserError: the file or the network cannot be opened, or they do not fit; one line.
    """
    file = read_classifier(path)
    try:
        classifier = open_classifier(model or file.model, len(file.class_names), size_px=file.preprocessing.size_px)
    except UserError as error:
        if model is not None:
            raise
        raise UserError(f"{path}: its network cannot be opened; --model says where it is ({error})") from error
    classifier.preprocessing = file.preprocessing
    put_in(str(path), classifier, file)
    return classifier.eval(), file


def put_in(label: str, classifier: Classifier, file: ClassifierFile) -> None:
    """Puts a file's adapter and head into the network it was made for.

    Raises:
        UserError: it is another network, by its layers or by its weights.
    """
    head = classifier.head
    if head.weight.shape != file.head["weight"].shape:
        raise UserError(
            f"{label}: has a head of {file.head['weight'].shape[1]} features, {file.model} made it; this network has "
            f"{head.in_features}"
        )
    same = classifier.mark.shape == file.fingerprint.shape
    apart = distance(file.fingerprint, classifier.mark) if same else None
    if apart is None or apart > SAME_BASE:
        what = "another architecture" if apart is None else f"other weights, {apart:.1%} away"
        raise UserError(f"{label}: was made for {file.model}; this network has {what}")
    head.load_state_dict(file.head)
    if file.config is not None:
        expected = adapter_shapes(classifier.network, file.config)
        found = {key: tuple(value.shape) for key, value in file.state.items()}
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if wrong:
            raise UserError(
                f"{label}: corrupt, {len(wrong)} of its tensors do not fit the network, such as {wrong[0]}"
            )
        add_adapter(classifier.network, file.config)
        set_peft_model_state_dict(classifier.network, file.state)
    classifier.requires_grad_(False)


def open_tests(tested: TestedSettings, files: Sequence[ClassifierFile]) -> LabelledSet:
    """The images that classifiers are tried on; those that a share of the data was kept for are the same as in their
    trainings.

    Raises:
        UserError: as `open_set`, or they kept different ones and the settings do not say which.
    """
    if tested.data is None:
        if tested.test_data is None:
            raise UserError("data or test_data is required: labelled images")
        return LabelledSet([], *test_images(tested.test_data, files[0].class_names))
    kept = {}
    for name, usual in (("test_share", 0.2), ("seed", 0)):
        told = {file.training.get(name, usual) for file in files}
        given = getattr(tested, name)
        kept[name] = given if given is not None else told.pop() if len(told) == 1 else None
    return open_set(tested.data, dataset_dir=tested.dataset_dir, test_data=tested.test_data, **kept)
