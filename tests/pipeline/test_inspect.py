"""`sd-atoms inspect`: counts of the known UNets, and measures of what an adapter changes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from sd_atoms import AtomsConfig, save_atoms
from sd_atoms.atoms import channel_change
from sd_atoms.atoms.measures import atom_changes, condition, energy, frequency_gain, relative_change
from sd_atoms.cli import main
from sd_atoms.errors import AtomsWarning
from sd_atoms.methods.adapters import add_adapter, tuner_layers
from sd_atoms.pipeline import read_artefact
from sd_atoms.pipeline.architectures import SD_V1_4, build_unet
from sd_atoms.pipeline.artefact_files import write_artefact
from sd_atoms.pipeline.inspection import SETTINGS, inspect_adapter, inspect_architecture, unet_change
from sd_atoms.report.atoms import Change, atoms_figure
from sd_atoms.report.inspection import adapter_text, architecture_text
from sd_atoms.report.table import text_table
from sd_atoms.tuner import TARGET_SETS, AtomsLayer, layer_plan, named_targets

BLOCKS = ["conv_in", "down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1",
          "up_blocks.2", "conv_out"]  # fmt: skip


# The known UNets


@pytest.mark.parametrize(
    ("arch", "parameters", "layers"),
    [
        ("sd-v1-4", 859_520_964,
         {"conv3x3": 52, "spatial": 52, "conv": 98, "conv+linear": 282, "dense": 282, "attn": 128, "all-linear": 184}),
        ("sd-v2-1", 865_910_724,
         {"conv3x3": 52, "spatial": 52, "conv": 66, "conv+linear": 282, "dense": 282, "attn": 128, "all-linear": 216}),
        ("sdxl", 2_567_463_684,
         {"conv3x3": 40, "spatial": 40, "conv": 51, "conv+linear": 794, "dense": 794, "attn": 560, "all-linear": 743}),
    ],
)  # fmt: skip
def test_sizes_of_the_known_unets(arch, parameters, layers):
    result = inspect_architecture(arch)
    assert result["parameters"] == parameters
    assert {entry["target_set"]: entry["layers"] for entry in result["target_sets"]} == layers
    for entry in result["target_sets"]:
        kinds = entry["kinds"]
        assert sum(kinds.values()) == entry["layers"]
        spatial = kinds.get("3×3", 0)
        assert entry["trained_numbers"] == 81 * spatial + 4**4 * (entry["layers"] - spatial)
    assert f"{parameters / 1e6:.1f} M" in architecture_text(result)


def test_counts_of_sd_v1_4():
    result = inspect_architecture("sd-v1-4")
    sets = {entry["target_set"]: entry for entry in result["target_sets"]}
    assert sets["conv+linear"]["kinds"] == {"3×3": 52, "Linear": 184, "1×1": 46}
    weights = {name: entry["weights"] / 1e6 for name, entry in sets.items()}
    assert weights["conv3x3"] == pytest.approx(541.0, abs=0.05)
    assert weights["conv"] - weights["conv3x3"] == pytest.approx(48.0, abs=0.05)
    assert weights["all-linear"] == pytest.approx(270.0, abs=0.05)
    assert {e["setting"]: (e["trained_numbers"], e["beta_frozen"]) for e in result["settings"]} == {
        "m=6": (2_808, None),
        "m=9": (4_212, None),
        "m=12, sparse": (5_616, None),
        "m=9, m1=3": (1_516_104, 12_636),
        "m=9, m1=4": (2_021_472, 16_848),
        "blocks kc=4, m_c=9": (1_078_272, None),
        "blocks kc=2, m_c=9": (67_392, None),
    }


@pytest.mark.parametrize(
    "values",
    [
        *SETTINGS.values(),
        dict(m1=3, train_beta=False),
        dict(m1=4, train_beta=False),
        dict(m=9, kc=4, target_modules="conv+linear"),
        dict(m=9, m1=3, kc=4, target_modules="conv"),
        dict(m=9, kc=2, m_c=3, block_layers="all"),
    ],
    ids=str,
)
def test_an_attached_adapter_trains_what_its_plan_says(values):
    unet = build_unet(SD_V1_4, "meta")
    modules = dict(unet.named_modules())
    config = AtomsConfig(**values, inference_mode=True)  # nothing is decomposed, so that no values are needed
    names = named_targets(unet, config.target_modules)
    planned = [layer_plan(config, n, modules[n]).trainable_params(modules[n], config.train_beta) for n in names]
    unet.add_adapter(config)
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, AtomsLayer)}
    assert list(layers) == names
    attached = [
        sum(getattr(layer, part)["default"].numel() for part in layer.adapter_layer_names
            if "default" in getattr(layer, part))
        for layer in layers.values()
    ]  # fmt: skip
    assert attached == planned
    listed = [e for e in inspect_architecture("sd-v1-4")["settings"] if e["config"] == values]
    assert [e["trained_numbers"] for e in listed] == ([sum(planned)] if listed else [])


# Measures


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (4,), (2, 3, 4)])
def test_gain_is_that_of_the_fourier_transform(kernel):
    weight, change = normal(6, 4, *kernel), 0.3 * normal(6, 4, *kernel, seed=1)
    axes, size = tuple(range(2, 2 + len(kernel))), 12  # padded with zeros: the transform at multiples of 2π/12
    base, adapted = (torch.fft.fftn(f, s=(size,) * len(kernel), dim=axes) for f in (weight, weight + change))
    for step in (0, 1, 5, 6):
        at = (..., *(step,) * len(kernel))
        expected = (adapted[at].abs().square().sum() / base[at].abs().square().sum()).sqrt().item()
        assert frequency_gain(weight, change, 2 * math.pi * step / size) == pytest.approx(expected, rel=1e-12)


def test_gain_of_filters_that_do_not_answer():
    edge = torch.tensor([[[-1.0, 0.0, 1.0]]])
    assert frequency_gain(edge, 0.5 * edge, 0.0) == 1
    assert frequency_gain(edge, torch.ones_like(edge), 0.0) == math.inf
    assert frequency_gain(edge, 0.5 * edge, 1.0) == pytest.approx(1.5)


def test_energy_and_relative_change():
    weight, change = normal(5, 4, 3, 3), normal(5, 4, 3, 3, seed=1)
    assert energy(weight) == pytest.approx(sum(value**2 for value in weight.flatten().tolist()), rel=1e-12)
    expected = np.linalg.norm(change.numpy()) / np.linalg.norm(weight.numpy())
    assert relative_change(weight, change) == pytest.approx(expected, rel=1e-12)
    assert relative_change(weight, torch.zeros_like(weight)) == 0
    assert relative_change(torch.zeros_like(weight), weight) == math.inf
    assert energy(torch.full((4000, 1000), 1e-4)) == pytest.approx(4e-2, rel=1e-6)  # float32 is summed up in float64


def test_condition_of_the_mixing():
    mixing = 0.2 * normal(9, 9)
    matrix = torch.eye(9, dtype=torch.float64) + mixing
    eigenvalues = torch.linalg.eigvalsh(matrix.T @ matrix)
    assert condition(mixing) == pytest.approx((eigenvalues[-1] / eigenvalues[0]).sqrt().item(), rel=1e-9)
    assert condition(torch.zeros(9, 9)) == 1
    assert condition(-torch.diag(torch.tensor([1.0, 0.0, 0.0]))) > 1e15


def test_atom_changes_are_over_all_that_an_atom_has():
    delta = normal(9, 4, 9)
    expected = [np.linalg.norm(delta[index].numpy()) for index in range(9)]
    assert atom_changes(delta).tolist() == pytest.approx(expected)


# An adapter


def adapted(pipe, path, about=None, **config):
    """Saves a random adapter of `pipe`; the pipeline keeps it."""
    generator = torch.Generator().manual_seed(1)
    pipe.unet.add_adapter(AtomsConfig(**config))
    for layer in pipe.unet.modules():
        if isinstance(layer, AtomsLayer):
            for part in (layer.atoms_delta, layer.atoms_block_delta):
                for delta in part.values():
                    delta.data.add_(0.05 * torch.randn(delta.shape, generator=generator))
    return str(save_atoms(pipe, path, about={"base": "pocket"} if about is None else about))


def rows_of(text):
    """The layers that a text lists."""
    return [line.split()[0] for line in text.splitlines() if "3×3" in line]


@pytest.fixture
def opened(pipe, monkeypatch):
    """`open_base` hands out a pocket that is open already, without its adapter."""

    def open_again(name, base_config):
        assert name == "pocket"
        if getattr(pipe.unet, "peft_config", None):
            pipe.unet.delete_adapters(list(pipe.unet.peft_config))
        return pipe

    monkeypatch.setattr("sd_atoms.pipeline.inspection.open_base", open_again)


def test_numbers_of_an_adapter(pipe, pocket, opened, tmp_path):
    base = {name: module for name, module in pocket.unet.named_modules() if type(module) is torch.nn.Conv2d}
    training = {"steps": 300, "pictures_per_step": 4, "learning_rate": 0.01, "seed": 0}
    about = {"base": "pocket", "instance_prompt": "photo of a <castle>.", "training": training}
    file = adapted(pipe, tmp_path / "castle.safetensors", about)
    state = read_artefact(file).state
    result = inspect_adapter(file)
    assert [block["block"] for block in result["blocks"]] == BLOCKS
    assert (len(result["layers"]), result["trained_numbers"]) == (28, 28 * 81)
    assert result["distance_to_base"] == 0
    assert result["about"]["training"] == training
    whole, moved = 0.0, 0.0
    for entry in result["layers"]:
        name = entry["layer"]
        rows = base[name].weight.detach().double().flatten(2)  # (o, i, K)
        initial, delta = (state[f"{name}.atoms_{part}"].double() for part in ("initial", "delta"))
        change = rows @ initial.T @ delta
        whole, moved = whole + rows.square().sum(), moved + change.square().sum()
        assert entry["energy"] == pytest.approx(change.square().sum().item(), rel=1e-4)
        assert entry["relative_change"] == pytest.approx((change.norm() / rows.norm()).item(), rel=1e-4)
        flat = ((rows + change).sum(2).norm() / rows.sum(2).norm()).item()
        assert entry["gain_zero"] == pytest.approx(flat, rel=1e-3)
        values = torch.linalg.svdvals(torch.eye(9, dtype=torch.float64) + initial.T @ delta)
        assert entry["condition"] == pytest.approx((values[0] / values[-1]).item(), rel=1e-4)
        assert entry["atom_changes"] == pytest.approx(delta.norm(dim=1).tolist(), rel=1e-4)
        assert torch.tensor(entry["atoms_change"]) == pytest.approx(delta.float())
        assert entry["kind"] == "3×3"
    assert result["relative_change"] == pytest.approx((moved / whole).sqrt().item(), rel=1e-4)
    assert sum(entry["share"] for entry in result["layers"]) == pytest.approx(1)
    assert sum(block["share"] for block in result["blocks"]) == pytest.approx(1)
    text = adapter_text(result, top=2)
    assert "photo of a <castle>." in text
    assert "300 steps, 4 pictures per step, learning rate 0.01, seed 0" in text
    assert "The 2 of 28 layers that changed most" in text
    strongest = sorted(result["layers"], key=lambda entry: -entry["energy"])
    assert sorted(rows_of(text)) == sorted(entry["layer"] for entry in strongest[:2])
    assert rows_of(adapter_text(result)) == [entry["layer"] for entry in result["layers"]]


def test_numbers_of_overcomplete_atoms_with_blocks_beside(pipe, pocket, opened, tmp_path):
    folder = adapted(pipe, tmp_path / "adapter", m1=2, kc=2, target_modules="conv")
    result = inspect_adapter(folder)
    state = read_artefact(folder).state
    layers = {entry["layer"]: entry for entry in result["layers"]}
    assert "overcomplete" in result["mode"]
    assert "block atoms kc=2" in result["mode"]
    assert result["trained_numbers"] == sum(v.numel() for k, v in state.items() if not k.endswith("_initial"))
    spatial = layers["mid_block.resnets.0.conv1"]
    rows = pocket.unet.mid_block.resnets[0].conv1.weight.detach().flatten(2)
    initial, delta, beta = (state[f"{spatial['layer']}.atoms_{part}"] for part in ("initial", "delta", "beta"))
    per_channel = channel_change(beta, delta)  # (i, m, K)
    change = torch.einsum("oit,mt,imk->oik", rows, initial, per_channel)
    assert spatial["energy"] == pytest.approx(change.square().sum().item(), rel=1e-3)
    assert spatial["atom_changes"] == pytest.approx(delta.flatten(1).norm(dim=1).tolist(), rel=1e-4)
    assert (spatial["condition"], spatial["atoms"]) == (None, None)
    pointwise = next(entry for entry in result["layers"] if entry["kind"] == "1×1")
    assert (pointwise["gain_zero"], pointwise["condition"], pointwise["atom_changes"]) == (None, None, [])
    assert len(pointwise["block_atom_changes"]) == 4
    text = adapter_text(result)
    assert "b12: block atom 12" in text
    assert f"b{int(np.argmax(pointwise['block_atom_changes']))}: " in text


@pytest.mark.parametrize(
    "config",
    [dict(m=6), dict(m=12, solver="sparse"), dict(m=0, kc=2, block_layers="all"), dict(m1=2, train_beta=False)],
    ids=str,
)
def test_every_kind_of_adapter_can_be_inspected(pipe, opened, tmp_path, config):
    layers = ["mid_block.resnets.0.conv1", "conv_in"]
    file = adapted(pipe, tmp_path / "a.safetensors", **config, target_modules=layers)
    expected = {
        name: module.get_delta_weight("default").square().sum().item()
        for name, module in pipe.unet.named_modules()
        if isinstance(module, AtomsLayer)
    }
    result = inspect_adapter(file)
    assert {entry["layer"]: entry["energy"] for entry in result["layers"]} == pytest.approx(expected, rel=1e-3)
    assert all((entry["condition"] is not None) == (config == dict(m=6)) for entry in result["layers"])
    assert "conv_in" in adapter_text(result)


def test_an_adapter_without_any_change(pipe, opened, tmp_path):
    pipe.unet.add_adapter(AtomsConfig(target_modules=["conv_in"]))
    file = save_atoms(pipe, tmp_path / "a.safetensors", about={"base": "pocket"})
    (entry,) = inspect_adapter(str(file))["layers"]
    assert (entry["energy"], entry["share"], entry["gain_zero"], entry["condition"]) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("config", "line", "numbers"),
    [
        (AtomsConfig(m=0, kc=4, target_modules=["q_proj"]), "block atoms kc=4, svd solver: 4 layers", 4 * 4**4),
        (LoraConfig(r=2, target_modules=["q_proj"]), "LoRA r=2: 4 layers", 4 * 2 * (128 + 128)),
    ],
    ids=["atoms", "lora"],
)
def test_the_part_for_the_text_encoder_is_one_line(pipe, tmp_path, config, line, numbers):
    add_adapter(pipe.text_encoder, config)
    folder = adapted(pipe, tmp_path / "a", target_modules=["conv_in"])
    result = inspect_adapter(folder)
    assert result["text_encoder"]["trained_numbers"] == numbers
    assert (result["trained_numbers"], len(result["layers"])) == (81, 1)
    assert f"text      {line} of the text encoder, {numbers:,} numbers" in adapter_text(result).splitlines()
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert result["bytes"] == sum(path.stat().st_size for path in files)


def test_another_base_is_told_by_its_distance(pipe, opened, tmp_path):
    file = adapted(pipe, tmp_path / "a.safetensors", about={"base": "some/base"}, target_modules=["conv_in"])
    with torch.no_grad():
        pipe.unet.conv_in.base_layer.weight.mul_(1.1)
    with pytest.warns(AtomsWarning, match="trained on some/base"):
        result = inspect_adapter(file, "pocket")
    assert result["distance_to_base"] == pytest.approx(0.1, abs=0.02)
    assert "pocket (trained on some/base), weights 9" in adapter_text(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_far_below_the_rounding_of_the_base_is_measured(dtype):
    unet = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3)).to(dtype)
    add_adapter(unet, LoraConfig(r=2, target_modules=["0"]))
    (layer,) = tuner_layers(unet).values()
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=1e-4)
    up, down = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
    change = torch.einsum("or,rikl->oikl", up.flatten(1), down) * layer.scaling["default"]
    assert unet_change(unet) == pytest.approx((change.norm() / before.float().norm()).item(), rel=0.02)
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.base_layer.weight.dtype == dtype
    assert unet_change(torch.nn.Conv2d(8, 8, 3)) is None


# The command


def test_the_command_prints_and_writes(pipe, tmp_path, capsys):
    file = adapted(pipe, tmp_path / "castle.safetensors")
    picture, numbers = tmp_path / "new" / "atoms.png", tmp_path / "atoms.json"
    assert main(["inspect", file, "--top", "3", "--plot", str(picture), "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    assert "pocket, the weights it was trained on" in printed
    result = json.loads(numbers.read_text())
    assert adapter_text(result, 3) == printed.rstrip("\n")
    assert Image.open(picture).format == "PNG"
    width, height = Image.open(picture).size
    assert (width > 1500, height > 900) == (True, True)
    assert [path.name for path in picture.parent.iterdir()] == ["atoms.png"]


def test_the_command_counts(tmp_path, capsys):
    numbers = tmp_path / "sd.json"
    assert main(["inspect", "--arch", "sd-v1-4", "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    for text in (*TARGET_SETS, "859.5 M", "1,516,104", "12,636"):
        assert text in printed
    assert json.loads(numbers.read_text()) == inspect_architecture("sd-v1-4")


def test_a_broken_or_homeless_adapter_is_one_line(pipe, tmp_path, capsys):
    homeless = adapted(pipe, tmp_path / "homeless.safetensors", about={}, target_modules=["conv_in", "conv_out"])
    artefact = read_artefact(homeless)
    artefact.about["base"] = [1]
    strange = str(write_artefact(artefact, tmp_path / "strange.safetensors"))
    artefact.state["conv_out.atoms_delta"][0, 0] = math.nan
    broken = str(write_artefact(artefact, tmp_path / "broken.safetensors"))
    for words, message in (
        ([homeless], "pretrained_model_name_or_path (--base) is required"),
        ([strange], "its header says nothing sensible about base"),
        (
            [homeless, "--base", "./nowhere"],
            "pretrained_model_name_or_path: './nowhere' is neither an existing path nor a hub id",
        ),
        ([broken, "--base", "pocket"], "1 of its tensors are not finite (conv_out.atoms_delta first)"),
    ):
        assert main(["inspect", *words]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either an ADAPTER or --arch"),
        (["a.safetensors", "--arch", "pocket"], "either an ADAPTER or --arch"),
        (["--arch", "sd-v3"], "--arch: 'sd-v3' is not one of sd-v1-4"),
        (["--arch", "pocket", "--top", "3", "--plot", "a.png"], "--top, --plot: for an ADAPTER, not for --arch"),
        (["a.safetensors", "--top", "-1"], "--top: -1 is out of range"),
        (["a.safetensors", "--plot", "a.pdf"], "--plot a.pdf: the name of a .png file is needed"),
        (["nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_words_are_one_line_and_exit_code_2(words, message, capsys):
    assert main(["inspect", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_help_is_complete(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for word in ("ADAPTER", "--arch", "--base", "--top", "--plot", "--json"):
        assert word in printed


# Report


def fake_changes(count, drawn, m=9, kernel=(3, 3)):
    random = np.random.default_rng(0)
    atoms = random.normal(size=(m, math.prod(kernel)))
    return [
        Change(
            f"down_blocks.{index // 8}.layer{index}", f"down_blocks.{index // 8}", 1 / count, 0.01, kernel,
            atoms if index < drawn else None, 0.01 * atoms if index < drawn else None,
        )
        for index in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "drawn", "m", "kernel"), [(20, 9, 20, (5, 3)), (3, 1, 2, (3, 3)), (90, 0, 9, (1,))])
def test_the_figure_has_an_axis_per_layer_shown(count, drawn, m, kernel):
    figure = atoms_figure(fake_changes(count, drawn, m, kernel), "title")
    pictures = [axes for axes in figure.axes if axes.images]
    assert len(pictures) == min(drawn, 4)
    for axes in pictures:
        limits = axes.images[0].get_clim()
        assert limits[0] == -limits[1] < 0
        assert len(axes.get_xticks()) == min(m, 12)
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == ["before", "change ×50", "after"] or labels[1] == "change ×100"
        shown = np.ma.compressed(axes.images[0].get_array())
        assert np.abs(shown[np.isfinite(shown)]).max() <= limits[1] * (1 + 1e-9)
    (bars,) = [axes for axes in figure.axes if axes.patches and not axes.images]
    assert len(bars.patches) == count


def test_a_figure_needs_a_layer():
    with pytest.raises(ValueError, match="at least one layer"):
        atoms_figure([], "title")


def test_table_columns_are_as_wide_as_they_need_to_be():
    assert (
        text_table(["name", "n"], [["a", "10"], ["longer", "5"]]) == "name     n\n------  --\na       10\nlonger   5"
    )
    assert text_table(["n", "what"], [["1", "x"]], left=(1,)) == "n  what\n-  ----\n1  x"
