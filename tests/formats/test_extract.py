"""`sd-atoms extract`: atoms come back from what they made, and what is not theirs is told."""

import pytest
import torch
from adapters import write_adapter
from files import CONV, LINEAR, TEXT, kohya_file, lora
from helpers import tiny_base
from PIL import Image

import sd_atoms
from sd_atoms.atoms import channel_change
from sd_atoms.atoms.fit import fit_atoms, fit_overcomplete
from sd_atoms.cli import main
from sd_atoms.pipeline import open_base, read_artefact

WIDE = r"(mid_block|down_blocks\.1)\.resnets.*conv[12]"  # layers of 16 outputs


def run(*words):
    return main(["extract", *map(str, words)])


def changes_of(file):
    pipe = open_base(tiny_base())
    layers = sd_atoms.load_adapter(pipe, file).layers
    return {name: pipe.unet.get_submodule(name).get_delta_weight("default") for name in layers}


def assert_same_changes(found, expected, share):
    ours, theirs = changes_of(found), changes_of(expected)
    assert list(ours) == list(theirs)
    for name, change in theirs.items():
        assert (ours[name] - change).norm() <= share * change.norm() + 1e-7, name


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("m", [9, 4])
def test_fitted_atoms_are_the_least_squares_solution(m):
    rows, change, atoms = normal(50, 9), normal(50, 9, seed=1), torch.linalg.qr(normal(9, 9, seed=2))[0][:m]
    expected = torch.linalg.lstsq(rows @ atoms.T, change).solution
    assert torch.allclose(fit_atoms(rows, change, atoms), expected, atol=1e-10)


def test_fitted_overcomplete_atoms_are_those_that_made_the_change():
    filters, atoms = normal(40, 5, 9), torch.linalg.qr(normal(9, 9, seed=2))[0]
    beta, delta = normal(5, 9, 3, seed=3), normal(9, 3, 9, seed=4)
    made = channel_change(beta, delta)  # (i, m, K)
    change = torch.einsum("oik,mk,iml->oil", filters, atoms, made)
    found = channel_change(*fit_overcomplete(filters, change, atoms, 3))
    assert torch.allclose(found, made, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "target", "words"),
    [
        ({}, None, ()),
        ({"m": 4}, None, ("--m", "4")),
        ({"m1": 3}, WIDE, ("--m1", "3", "--target", WIDE)),
        ({"kc": 4}, "conv+linear", ("--kc", "4", "--target", "conv+linear")),
    ],
    ids=["m=9", "m=4", "m1=3", "kc=4"],
)
def test_what_atoms_made_comes_back(tmp_path, capsys, settings, target, words):
    file = write_adapter(tmp_path / "atoms.safetensors", tiny_base(), "atoms", target=target, **settings)
    assert main(["export", str(file), "--to", "diff", "--dtype", "fp32", "--out", str(tmp_path), "--name", "x"]) == 0
    found = tmp_path / "found.safetensors"
    assert run(tmp_path / "x-diff.safetensors", "--base", tiny_base(), "--out", found, *words) == 0
    assert "explained in all: 100.0%" in capsys.readouterr().out
    assert_same_changes(found, file, 1e-5)


def test_a_lora_is_told_to_lie_outside(tmp_path, capsys):
    pipe = open_base(tiny_base())
    weights = {name: pipe.unet.get_submodule(name).weight.detach() for name in (LINEAR, CONV)}
    parts = {name: lora(weight, rank=1) for name, weight in weights.items()}
    file = kohya_file(tmp_path / "a.safetensors", {name: own for name, (own, _) in parts.items()})
    energies = {name: float(change.square().sum()) for name, (_, change) in parts.items()}
    rows, change = weights[CONV].reshape(-1, 9).double(), parts[CONV][1].reshape(-1, 9)
    left = change - rows @ torch.linalg.lstsq(rows, change).solution
    explained = 1 - float(left.square().sum()) / energies[CONV]
    share = energies[CONV] / sum(energies.values())
    out = tmp_path / "found.safetensors"
    assert run(file, "--base", tiny_base(), "--out", out) == 2
    said = capsys.readouterr()
    assert f"{CONV}" in said.out
    assert f"{explained:.1%}\n" in said.out
    assert f"in layers with atoms: {share:.1%} of the change\n" in said.out
    assert f"outside of them: {1 - share:.1%} in attention\n" in said.out
    assert f"explained in all: {share * explained:.1%}\n" in said.out
    assert "less than --floor 0.5" in said.err
    assert not out.exists()
    assert run(file, "--base", tiny_base(), "--out", out, "--force") == 0
    assert read_artefact(out).layers == [CONV]


def test_a_fine_tuned_model_and_its_pictures(tmp_path, capsys):
    file = write_adapter(tmp_path / "atoms.safetensors", tiny_base(), "atoms")
    to = ("--to", "checkpoint", "--dtype", "fp32", "--out", tmp_path, "--name", "x")
    assert main(["export", *map(str, (file, *to))]) == 0
    out = tmp_path / "found.safetensors"
    for model, more in (("x-checkpoint", ()), ("x-checkpoint.safetensors", ("--base_config", tiny_base()))):
        words = ("--base", tiny_base(), "--out", out, "--prompt", "photo of a castle", "--overwrite", *more)
        assert run(tmp_path / model, *words) == 0
        assert "explained in all: 100.0%" in capsys.readouterr().out
        assert_same_changes(out, file, 1e-4)  # a weight and its change are rounded together
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.info["prompt"] == "photo of a castle"
    assert run(tiny_base(), "--base", tiny_base(), "--out", tmp_path / "none.safetensors") == 2
    assert "changes nothing" in capsys.readouterr().err
    assert run("pocket", "--base", tiny_base(), "--out", tmp_path / "none.safetensors") == 2
    assert "another architecture" in capsys.readouterr().err


def test_a_change_outside_of_the_target_is_reported(tmp_path, capsys):
    parts, _ = lora(open_base(tiny_base()).unet.get_submodule(LINEAR).weight.detach())
    file, out = kohya_file(tmp_path / "a.safetensors", {LINEAR: parts}), tmp_path / "found.safetensors"
    for more in ((), ("--force",), ("--floor", "0")):
        assert run(file, "--base", tiny_base(), "--out", out, *more) == 2
        said = capsys.readouterr()
        assert "in layers with atoms: 0.0% of the change\noutside of them: 100.0% in attention\n" in said.out
        assert "atoms explain 0.0% of its change, which is outside of conv3x3; --target conv+linear --kc 4" in said.err
        assert not out.exists()
    text = lora(open_base(tiny_base()).text_encoder.get_submodule(TEXT).weight.detach())[0]
    assert run(kohya_file(tmp_path / "b.safetensors", {}, {TEXT: text}), "--base", tiny_base(), "--out", out) == 2
    said = capsys.readouterr()
    assert "outside of them: 100.0% in text encoder\n" in said.out
    assert "only convolutions and Linear layers of the UNet" in said.err
    assert run(file, "--base", tiny_base(), "--out", out, "--target", "conv+linear", "--kc", "4", "--force") == 0
    assert read_artefact(out).layers == [LINEAR]


def test_a_picture_in_the_way_is_named_by_the_flag_that_places_it(tmp_path, capsys):
    (tmp_path / "atoms.png").touch()
    assert run(tmp_path / "none.safetensors", "--out", tmp_path / "atoms.safetensors") == 2
    assert f"--out {tmp_path / 'atoms.png'}: exists; pass --overwrite" in capsys.readouterr().err
