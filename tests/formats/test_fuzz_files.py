"""Malformed files of other programs: every command that reads them ends in one line and exit code 2, or does its work.

A case is run again by its seed: pytest tests/formats/test_fuzz_files.py -m "slow or not slow" -k "seed_3".
"""

import random

import pytest
import torch
from files import KINDS, NORM, TEXT, draw, kohya_file, lora
from helpers import tiny_base
from safetensors.torch import load_file, save_file

from sd_atoms.cli import main
from sd_atoms.files import leftovers
from sd_atoms.pipeline import open_base

SEEDS, CASES = 12, 25


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of every kind, as they should be."""
    folder, pipe = tmp_path_factory.mktemp("whole"), open_base(tiny_base())
    made = []
    for number, (layer, parts) in enumerate(KINDS.values()):
        layers = {layer: parts(pipe.unet.get_submodule(layer).weight.detach())[0]}
        layers[NORM] = {"w_norm": draw(8), "b_norm": draw(8)}
        text = {TEXT: lora(pipe.text_encoder.get_submodule(TEXT).weight.detach())[0]}
        word = {"bundle_emb.castle.emb_params": draw(1, 16)}
        made.append(kohya_file(folder / f"{number}.safetensors", layers, text, {"ss_v2": "x"}, **word))
    return made


def spoilt(rng, source, path):
    """Writes a file with something wrong."""
    content, kind = source.read_bytes(), rng.choice(["cut", "bytes", "header", *["tensors"] * 6])
    if kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind in ("bytes", "header"):
        content, most = bytearray(content), len(content) if kind == "bytes" else 400
        for _ in range(rng.choice([1, 3, 20])):
            content[rng.randrange(min(most, len(content)))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    else:
        state = load_file(source)
        for _ in range(rng.choice([1, 1, 2, 4])):
            key = rng.choice([*state])
            value = state[key]
            change = rng.choice(
                ["nan", "huge", "drop", "empty", "vector", "wider", "turned", "whole", "rename", "many"]
            )
            if change == "nan":
                state[key] = torch.full_like(value, rng.choice([float("nan"), float("inf")]))
            elif change == "huge":
                state[key] = value * 1e30
            elif change == "drop" and len(state) > 1:
                del state[key]
            elif change == "empty":
                state[key] = torch.zeros(0)
            elif change == "vector":
                state[key] = value.flatten().repeat(3)
            elif change == "wider":
                state[key] = torch.cat([torch.atleast_1d(value)] * 2)
            elif change == "turned":
                state[key] = value.movedim(0, -1).contiguous() if value.dim() else value
            elif change == "whole":
                state[key] = value.to(rng.choice([torch.int64, torch.float16, torch.bool, torch.bfloat16]))
            elif change == "rename":
                others = ("alpha", "diff", "lora_up.weight", "hada_t1", "lokr_w1_a", "w_norm", "what", "diff_b")
                state[key.rpartition("_")[0] + "_" + rng.choice(others)] = value
                state[key.partition(".")[0] + "." + rng.choice(others)] = value
            else:
                state |= {f"lora_unet_x.{number}": draw(1) for number in range(100)}
        save_file({key: value.clone() for key, value in state.items()}, path)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, id=f"seed_{n}", marks=() if n == 0 else pytest.mark.slow) for n in range(SEEDS)]
)
def test_malformed_files_end_in_one_line_or_are_handled(whole, tmp_path, capsys, seed):
    rng, path, out = random.Random(seed), tmp_path / "a.safetensors", tmp_path / "out"
    for _ in range(CASES):
        spoilt(rng, rng.choice(whole), path)
        base = ["--base", tiny_base()]
        words = rng.choice(
            [
                ["inspect", str(path)],
                ["import", str(path), *base, "--out", str(out / "b.safetensors"), "--overwrite"],
                ["export", str(path), *base, "--out", str(out), "--overwrite", "--to", rng.choice(["diff", "words"])],
                ["extract", str(path), *base, "--out", str(out / "c.safetensors"), "--overwrite", "--force"],
            ]
        )
        capsys.readouterr()
        code = main(words)
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert code == (2 if said else 0), (words, said)
        assert len(said) <= 1
        assert not said or (said[0].startswith("error: ") and len(said[0]) < 2000), said
        assert leftovers(tmp_path) == []
