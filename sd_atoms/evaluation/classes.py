"""Scores of generated images by class: how much of each class is covered, and whether a classifier knows them."""

from collections.abc import Sequence

import torch

from sd_atoms.evaluation.folder import NEAREST_K
from sd_atoms.evaluation.sets import CHUNK, reaches

RIDGE = 0.1  # of features of unit variance, against their mean square per image


def class_coverage(
    real: torch.Tensor, real_labels: Sequence[int], generated: torch.Tensor, generated_labels: Sequence[int] | None
) -> dict[int, float]:
    """Label -> share of its real images that have a generated one of that class within reach: nearer than the
    `NEAREST_K`-th nearest other real image, of any class (coverage, arXiv 2002.09797, class by class).

    Args:
        real, generated: features (N, d) and (M, d).
        real_labels: N classes.
        generated_labels: M classes; None where generated images have none, so that any of them counts.

    Raises:
        ValueError: there are no more than NEAREST_K real images.
    """
    if len(real) <= NEAREST_K:
        raise ValueError(f"more than {NEAREST_K} real images are needed, there are {len(real)}")
    x, y, reach = real.double(), generated.double(), reaches(real.double(), NEAREST_K)
    of_real, covered = torch.tensor(real_labels), torch.zeros(len(real), dtype=torch.bool)
    of_generated = None if generated_labels is None else torch.tensor(generated_labels)
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        near = torch.cdist(x[part], y) < reach[part, None]  # (n, M)
        if of_generated is not None:
            near &= of_real[part, None] == of_generated
        covered[part] = near.any(1)
    return {int(label): covered[of_real == label].double().mean().item() for label in of_real.unique()}


class Probe:
    """A linear classifier of features: least squares onto one-hot classes, with a ridge; deterministic, in float64."""

    def __init__(self, features: torch.Tensor, labels: Sequence[int], classes: int) -> None:
        """Fits it.

        Args:
            features: (N, d) of real training images.
            labels: their classes.
            classes: how many there are.
        """
        x = features.double()
        self.mean, self.scale = x.mean(0), x.std(0).clamp(min=1e-6)
        x = (x - self.mean) / self.scale
        targets = torch.nn.functional.one_hot(torch.tensor(labels), classes).double()
        self.offset = targets.mean(0)
        ridge = RIDGE * x.square().sum() / len(x) * torch.eye(len(x) if len(x) < x.shape[1] else x.shape[1])
        if len(x) < x.shape[1]:  # the same weights from the smaller of two systems
            self.weights = x.T @ torch.linalg.solve(x @ x.T + ridge, targets - self.offset)
        else:
            self.weights = torch.linalg.solve(x.T @ x + ridge, x.T @ (targets - self.offset))

    def right(self, features: torch.Tensor, labels: Sequence[int]) -> torch.Tensor:
        """(M,) float64: 1 where the classifier gives an image (M, d) its own class."""
        scores = (features.double() - self.mean) / self.scale @ self.weights + self.offset
        return scores.argmax(1).eq(torch.tensor(labels)).double()
