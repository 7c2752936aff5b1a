"""What a classifier says of images, and how right it is: logits of records, accuracy, calibration, confusion."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import BatchSampler

from sd_atoms.classify.models import Classifier
from sd_atoms.classify.training import centre_crop
from sd_atoms.data.images import to_unit
from sd_atoms.data.records import ImageRecord
from sd_atoms.evaluation.intervals import mean_figure, share_figure
from sd_atoms.machine import check_finite, read_ahead, shared_work
from sd_atoms.progress import followed

BATCH = 32
DRAWS = 1000
BINS = 15  # of confidence, as usual for the calibration error


@torch.no_grad()
def logits_of(classifier: Classifier, records: Sequence[ImageRecord], accelerator=None) -> torch.Tensor:
    """(N, classes) float32 on the CPU, in the order of the records; processes share the work, and all must call it."""
    device = classifier.head.weight.device

    def some(share: Sequence[ImageRecord]) -> list[np.ndarray]:
        ready = read_ahead(lambda record: centre_crop(record.read(), classifier.preprocessing), share)
        rows = []
        for batch in BatchSampler(followed(ready, len(share), "Images", "image"), BATCH, drop_last=False):
            pixels = classifier.preprocessing.normalised(to_unit(batch).to(device))
            # as numpy, since a row of a tensor takes its whole batch along to another process
            rows += [*classifier(pixels).float().cpu().numpy()]
        return rows

    found = torch.from_numpy(np.stack(shared_work(some, records, accelerator)))
    check_finite(found, "what the classifier says", "its file or its network is broken")
    return found


def scores_of(logits: torch.Tensor, labels: Sequence[int], class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its interval, by class, the calibration error and the confusion matrix.

    Args:
        logits: (N, classes).
        labels: of the N images.
        class_names: by label.

    Returns:
        accuracy, cross_entropy: value, n, low, high (95 %). by_class: name -> accuracy, None of a class without
        images. majority: the share of the commonest class. calibration_error: mean gap between confidence and
        accuracy over 15 bins of confidence (ECE, arXiv 1706.04599). confusion: counts, row = truth, column = said.
    """
    truth = torch.tensor(list(labels))
    said, right = logits.argmax(1), (logits.argmax(1) == truth)
    classes = len(class_names)
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    confusion.index_put_((truth, said), torch.ones_like(truth), accumulate=True)
    counts = confusion.sum(1)
    by_class = {
        name: (confusion[label, label] / counts[label]).item() if counts[label] else None
        for label, name in enumerate(class_names)
    }
    loss = F.cross_entropy(logits.double(), truth, reduction="none")
    return {
        "accuracy": share_figure(right).entries(),
        "cross_entropy": mean_figure(loss, DRAWS, seed=0).entries(),
        "majority": (counts.max() / len(truth)).item(),
        "calibration_error": calibration_error(logits, truth),
        "by_class": by_class,
        "confusion": confusion.tolist(),
    }


def calibration_error(logits: torch.Tensor, truth: torch.Tensor) -> float:
    """Σ over bins of n_b/N · |accuracy − mean confidence|."""
    confidence, said = logits.double().softmax(1).max(1)
    right = (said == truth).double()
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (b/15, (b + 1)/15]
    sums = torch.zeros(BINS, dtype=torch.float64)
    return sums.index_add(0, place, right - confidence).abs().sum().item() / len(truth)
