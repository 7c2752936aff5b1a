"""`bench decompose`: every convolution is factorised."""

import json

from tiny_unet import TINY

from sd_atoms.pipeline.architectures import build_unet
from sd_atoms.tuner import named_targets


def test_decompose_covers_every_convolution(bench, tmp_path):
    file = tmp_path / "decompose.json"
    bench("decompose", "--rounds", "2", "--json", str(file))
    result = json.loads(file.read_text())
    assert result["layers"] == len(named_targets(build_unet(TINY, "meta"), "conv"))
    assert sum(result["layers_by_kernel"].values()) == result["layers"]
    assert set(result["layers_by_kernel"]) == {"1×1", "3×3"}
    assert result["largest_relative_error"]["error"] < 1e-5
    assert 0 < result["slowest"]["seconds_median"] < result["seconds_median"]
