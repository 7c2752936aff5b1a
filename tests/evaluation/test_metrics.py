"""Metrics on features, against sums written out."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sd_atoms.evaluation.metrics import diversity, drift, match_share, mean_cosine, paired_cosine

A = normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
B = normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), dim=1)


def test_means_over_pairs():
    every = [float(a @ b) for a in A for b in B]
    assert mean_cosine(A, B) == pytest.approx(sum(every) / 36, abs=1e-6)
    assert paired_cosine(A, B) == pytest.approx(sum(float(A[i] @ B[i]) for i in range(6)) / 6, abs=1e-6)
    apart = [1 - float(A[i] @ A[j]) for i in range(6) for j in range(6) if i != j]
    assert diversity(A) == pytest.approx(sum(apart) / 30, abs=1e-6)


def test_extremes():
    assert diversity(A[:1].repeat(4, 1)) == pytest.approx(0, abs=1e-6)
    assert match_share(A, A) == 1.0
    assert match_share(A, A.roll(1, 0)) == 0.0


def test_drift_is_half_of_one_minus_the_cosine():
    a, b = A.double().numpy(), B.double().numpy()
    cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    assert drift(A, B) == pytest.approx(((1 - cosines) / 2).mean(), abs=1e-6)
    assert drift(A, A) == 0
    assert drift(A, -A) == pytest.approx(1, abs=1e-6)
