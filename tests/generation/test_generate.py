"""Images from prompts and seeds."""

import numpy as np
import pytest
from tiny import write_tiny_base

from sd_atoms.generation import Request, generate
from sd_atoms.pipeline import open_base
from sd_atoms.pipeline.sampling import Sampling


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_base(str(write_tiny_base(tmp_path_factory.mktemp("generate") / "tiny")))


def test_pictures_drawn_together_are_those_drawn_alone_but_for_rounding(base):
    requests = [Request("a castle", seed, "") for seed in range(3)] + [Request("a lake", 0, "")]
    sampling = Sampling(7.5, 2, "ddim", None)
    alone = [np.asarray(image, dtype=int) for _, image in generate(base, requests, sampling)]
    together = list(generate(base, requests, sampling, batch_size=3))
    assert [request for request, _ in together] == requests
    for one, (_, other) in zip(alone, together, strict=True):
        assert np.abs(one - np.asarray(other, dtype=int)).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 1
