"""`bench forms`: every shape in every form."""

import json

from tiny_unet import TINY

from sd_atoms.bench import forms
from sd_atoms.cli import main
from sd_atoms.pipeline.architectures import build_unet
from sd_atoms.tuner import named_targets


def test_forms_times_every_shape_and_adds_up(bench, tmp_path):
    file = tmp_path / "forms.json"
    printed = bench("forms", "--resolution", "32", "--rounds", "1", "--json", str(file))
    result = json.loads(file.read_text())
    assert sum(layer["count"] for layer in result["layers"]) == len(named_targets(build_unet(TINY, "meta"), "conv3x3"))
    total = result["seconds_total"]
    assert total["best of each"] <= min(total["auto"], total["weight"], total["activation"])
    assert f"{total['floor']:.2f}" in printed
    assert result["settings"]["resolution_px"] == 32
    assert printed.splitlines()[1].startswith("i→o @ input ")
    for layer in result["layers"]:
        height, width = layer["input_size"]
        assert f"{layer['in_channels']}→{layer['out_channels']} @ {height}×{width} " in printed
    assert result["best_constants"]["seconds"] >= total["best of each"]


def test_best_constants_are_where_the_forms_cross():
    def layer(positions_per_channel, out_channels, weight, activation, split):
        seconds = {"floor": 1.0, "weight": weight, "activation": activation, "split": split}
        shape = dict(positions_per_channel=positions_per_channel, out_channels=out_channels)
        return dict(count=2, seconds=seconds, **shape)

    layers = [
        layer(4.0, 64, 1.0, 3.0, 2.5),
        layer(0.5, 640, 3.0, 1.0, 1.5),
        layer(1.5, 320, 2.0, 1.5, 1.25),
    ]
    seconds = 2 * (1 + 1 + 1.25)
    assert forms.best_constants(layers) == {"reach": [0.5, 1.5], "few_channels": [64, 320], "seconds": seconds}


def test_a_resolution_that_latents_do_not_fit_is_refused(capsys):
    assert main(["bench", "forms", "--resolution", "100"]) == 2
    assert "--resolution 100: a multiple of 8" in capsys.readouterr().err
