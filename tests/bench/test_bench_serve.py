"""`bench serve`: adapters unmerged and merged, and the hot-swap."""

import json

import torch
from tiny_unet import TINY

from sd_atoms.bench import architectures, serve
from sd_atoms.pipeline.architectures import build_unet


def test_serve_times_every_way_and_the_swap(bench, tmp_path):
    file = tmp_path / "serve.json"
    printed = bench("serve", "--resolution", "32", "--rounds", "2", "--steps", "1", "--json", str(file))
    result = json.loads(file.read_text())
    assert [entry["way"] for entry in result["ways"]] == ["base", "atoms unmerged", "LoRA unmerged", "atoms merged"]
    assert result["ways"][0]["to_base"] == 1
    assert 0 < result["hotswap"]["seconds_min"] <= result["hotswap"]["seconds_median"]
    assert "hot-swap of a file" in printed


def test_what_serve_draws_with_is_adapted_and_shares_the_base():
    base = build_unet(TINY, "cpu").eval()
    adapted = serve._adapted(base, TINY, "atoms")
    inputs = architectures.step_inputs(TINY, 2, 32, "cpu", torch.float32)
    with torch.no_grad():
        assert not torch.equal(base(*inputs).sample, adapted(*inputs).sample)
    assert base.conv_in.weight.data_ptr() == adapted.conv_in.base_layer.weight.data_ptr()
