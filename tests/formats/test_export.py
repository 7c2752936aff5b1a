"""What `sd-atoms export` writes, taken by plain diffusers, by LyCORIS and by our own reading, for every method."""

import importlib.util
import re
import sys
import types

import numpy as np
import pytest
import torch
from adapters import TOKEN, write_adapter
from diffusers import StableDiffusionPipeline
from files import TEXT, kohya_file, lora
from helpers import tiny_base
from safetensors import safe_open
from safetensors.torch import load_file

import sd_atoms
from sd_atoms.cli import main
from sd_atoms.formats.keys import kohya_module
from sd_atoms.generation import Request, generate
from sd_atoms.methods import all_methods
from sd_atoms.methods.adapters import merge_adapters
from sd_atoms.pipeline import open_base, read_artefact
from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.sources import packaged_path

EXACT, REFUSED = "exact", "refused"
# method -> kind -> how it is written; all of them can be a checkpoint, and have words where they have tokens
TABLE = {
    "atoms": {"comfy": EXACT, "lora": EXACT, "diff": EXACT},
    **{
        name: {"comfy": REFUSED, "lora": EXACT, "diff": EXACT}
        for name in (
            "lora", "locon", "lora-conv", "loha", "lokr", "oft", "lycoris-locon", "lycoris-loha", "lycoris-lokr",
        )
    },
    **{name: {"comfy": REFUSED, "lora": REFUSED, "diff": EXACT} for name in ("difffit", "bitfit", "norm", "full")},
}  # fmt: skip

# written by the same lines as another one of the table
ALIKE = ("locon", "lokr", "lycoris-loha", "lycoris-lokr", "norm")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """method -> its adapter's file on the tiny base, made once."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}

    def file(method):
        if method not in made:
            made[method] = write_adapter(folder / f"{method}.safetensors", tiny_base(), method)
        return made[method]

    return file


def export(*words):
    return main(["export", *map(str, words)])


def merged_weights(pipe):
    """Name -> parameter of the UNet, with the adapters in it."""
    merge_adapters(pipe.unet)
    return {
        name.replace(".base_layer", ""): value.detach()
        for name, value in pipe.unet.named_parameters()
        if ".base_layer." in name or not any(part in name for part in ("lora_", "hada_", "lokr_", "atoms_", "oft_"))
    }


def plain_weights(base):
    return {name: value.detach().clone() for name, value in open_base(base).unet.named_parameters()}


def assert_same_change(found, expected, base):
    """Every weight changes alike: to 1e-6 of the largest change, beside what float32 can tell at the weight's size."""
    for name, value in base.items():
        change = expected[name] - value
        bound = 1e-6 * change.abs().max() + 4e-7 * value.abs().max()
        assert (found[name] - expected[name]).abs().max() <= bound, name


def drawn(pipe, prompt=f"photo of a {TOKEN}"):
    picture = next(iter(generate(pipe, [Request(prompt, 0, "")], Sampling(4.0, 3, "ddim", None))))[1]
    return np.asarray(picture).astype(int)


def adapted(file, base=None):
    pipe = open_base(base or tiny_base())
    sd_atoms.load_adapter(pipe, file)
    return pipe


@pytest.mark.parametrize("method", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in TABLE])
def test_every_method_comes_back_from_every_form_it_has(files, tmp_path, method, capsys):
    base, file = plain_weights(tiny_base()), files(method)
    expected = merged_weights(adapted(file))
    assert max((expected[name] - value).abs().max() for name, value in base.items()) > 1e-2
    exact = [kind for kind, how in TABLE[method].items() if how == EXACT]
    to = ("--dtype", "fp32", "--out", tmp_path, "--name", "x", "--to")
    assert export(file, *to, ",".join([*exact, "checkpoint"])) == 0
    for kind in {"lora", "diff"} & set(exact):
        assert_same_change(merged_weights(adapted(tmp_path / f"x-{kind}.safetensors")), expected, base)
    assert_same_change(plain_weights(str(tmp_path / "x-checkpoint")), expected, base)
    for kind in TABLE[method].keys() - set(exact):
        assert export(file, *to, kind) == 2
        assert f"error: --to {kind}: " in capsys.readouterr().err
        assert not (tmp_path / f"x-{kind}.safetensors").exists()
    assert set(all_methods()[method].exports) == {*exact, "checkpoint"}


@pytest.mark.parametrize("method", ["atoms", "lora", "lora-conv", "oft"])
def test_plain_diffusers_draws_the_same_from_lora(files, tmp_path, method):
    assert export(files(method), "--to", "lora,words", "--dtype", "fp32", "--out", tmp_path, "--name", "x") == 0
    plain = StableDiffusionPipeline.from_pretrained(tiny_base(), safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    before = drawn(plain, "photo of a castle")
    plain.load_lora_weights(str(tmp_path), weight_name="x-lora.safetensors")
    plain.load_textual_inversion(str(tmp_path / "castle-atoms.safetensors"), token=TOKEN)
    assert abs(drawn(plain, "photo of a castle") - before).max() > 1
    assert abs(drawn(plain) - drawn(adapted(files(method)))).max() <= 1


@pytest.mark.parametrize(
    ("method", "kind"), [("atoms", "lora"), ("atoms", "diff"), ("lokr", "lora"), ("lora", "lora")]
)
def test_lycoris_makes_the_same_change(files, tmp_path, method, kind):
    from lycoris.modules import get_module, make_module

    assert export(files(method), "--to", kind, "--dtype", "fp32", "--out", tmp_path, "--name", "x") == 0
    state, pipe, ours = load_file(tmp_path / f"x-{kind}.safetensors"), open_base(tiny_base()), adapted(files(method))
    for name in read_artefact(files(method)).layers:
        change, key = ours.unet.get_submodule(name).get_delta_weight("default"), kohya_module("unet", name)
        theirs = make_module(*get_module(state, key), key, pipe.unet.get_submodule(name))
        found = theirs.get_merged_weight()[0] - pipe.unet.get_submodule(name).weight
        assert torch.allclose(found.view_as(change), change, atol=1e-6 * float(change.abs().max()) + 3e-7)


def test_on_the_pocket_base(tmp_path, pipe, capsys):
    file = write_adapter(tmp_path / "castle.safetensors", "pocket", "atoms", 0.03)
    to = ("--to", "lora,checkpoint,comfy,words", "--dtype", "fp32", "--out", tmp_path)
    assert export(file, *to) == 0
    assert "castle-atoms" in capsys.readouterr().out
    sd_atoms.load_adapter(pipe, file)
    ours = drawn(pipe)
    plain = open_base("pocket")
    plain.load_lora_weights(str(tmp_path), weight_name="castle-lora.safetensors")
    plain.load_textual_inversion(str(tmp_path / "castle-atoms.safetensors"), token=TOKEN)
    assert abs(drawn(plain) - ours).max() <= 1
    assert abs(drawn(open_base(str(tmp_path / "castle-checkpoint"))) - ours).max() <= 1
    single = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "castle-checkpoint.safetensors"), config=str(packaged_path("pocket")),
        safety_checker=None, local_files_only=True,
    )  # fmt: skip
    folder = open_base(str(tmp_path / "castle-checkpoint"))
    for part in ("unet", "vae", "text_encoder"):
        read, whole = getattr(single, part).state_dict(), getattr(folder, part).state_dict()
        assert all(torch.equal(read[key], whole[key][: len(read[key])]) for key in whole)
    assert (tmp_path / "castle-comfy.safetensors").stat().st_size < 20_000


def test_files_have_what_programs_look_for(files, tmp_path):
    assert export(files("atoms"), "--to", "lora,diff,words", "--out", tmp_path, "--name", "x") == 0
    for kind, part in (("lora", "lora_down.weight"), ("diff", "diff")):
        state = load_file(tmp_path / f"x-{kind}.safetensors")
        for name, alias in (("conv_in", "input_blocks_0_0"), ("conv_out", "out_2")):
            assert torch.equal(state[f"lora_unet_{name}.{part}"], state[f"lora_unet_{alias}.{part}"])
        known_by = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
        assert not state[f"{known_by}.lora_up.weight"].any()
        assert state[f"{known_by}.lora_down.weight"].shape == (1, 16)
        assert all(value.dtype == torch.float16 for key, value in state.items() if not key.endswith("alpha"))
        with safe_open(tmp_path / f"x-{kind}.safetensors", "pt") as file:
            header = file.metadata()
        assert header["ss_network_module"] == "networks.lora"
        assert header["ss_output_name"] == "x"
        assert header["sd_atoms_base_fingerprint"]
    word = load_file(tmp_path / "castle-atoms.safetensors")
    assert list(word) == ["emb_params"]
    assert word["emb_params"].shape == (1, 16)
    assert word["emb_params"].dtype == torch.float16


def test_without_a_kind_it_says_what_there_is(files, tmp_path, capsys):
    assert export(files("atoms"), "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "Recommended: --to comfy,words" in said
    assert "plain diffusers opens that" in said
    assert [line.split()[0] for line in said.splitlines()[2:7]] == ["comfy", "checkpoint", "lora", "diff", "words"]
    assert not list(tmp_path.iterdir())
    assert export(files("bitfit")) == 0
    said = capsys.readouterr().out
    assert "LoRA has no place for" in said
    assert "Recommended: --to checkpoint,words" in said
    token = write_adapter(tmp_path / "token.safetensors", tiny_base(), "token")
    assert export(token) == 0
    assert "Recommended: --to words" in capsys.readouterr().out


def test_several_with_strengths_are_their_sum(files, tmp_path, capsys):
    sources, strengths = [files("atoms"), files("lora"), files("lokr")], (0.5, 2.0, -1.0)
    words = (",".join(map(str, sources)), "--strength", ",".join(map(str, strengths)))
    assert export(*words, "--to", "lora", "--dtype", "fp32", "--out", tmp_path, "--name", "x") == 0
    base = plain_weights(tiny_base())
    expected = dict(base)
    for source, strength in zip(sources, strengths, strict=True):
        merged = merged_weights(adapted(source))
        expected = {name: value + strength * (merged[name] - base[name]) for name, value in expected.items()}
    found = merged_weights(adapted(tmp_path / "x-lora.safetensors"))
    for name in base:
        assert torch.allclose(found[name], expected[name], atol=1e-5), name
    for kind, reason in (("comfy", "only atoms have"), ("words", "two of the adapters have a word <castle>")):
        assert export(*words, "--to", kind, "--out", tmp_path) == 2
        assert reason in capsys.readouterr().err


def test_a_lossy_rank_says_what_it_loses(files, tmp_path, capsys):
    file = files("atoms")
    assert export(file, "--to", "lora", "--lossy_rank", "2", "--dtype", "fp32", "--out", tmp_path, "--name", "x") == 0
    said = capsys.readouterr().out
    pipe, ours, changes = adapted(tmp_path / "x-lora.safetensors"), adapted(file), []
    for name in read_artefact(file).layers:
        change = ours.unet.get_submodule(name).get_delta_weight("default")
        values = torch.linalg.svdvals(change.flatten(1))
        lost = float(values[2:].square().sum() / values.square().sum()) ** 0.5
        found = pipe.unet.get_submodule(name).get_delta_weight("default")
        assert float((found - change).norm() / change.norm()) == pytest.approx(lost, abs=1e-4)
        assert f"  {name}: {lost:.1%} of its change lost" in said
        changes.append((change, found))
    lost, whole = (
        sum(float(d.square().sum()) for d in own) for own in zip(*((f - c, c) for c, f in changes), strict=True)
    )
    assert f"  in all: {(lost / whole) ** 0.5:.1%} of the change lost" in said


BLOCKS = [{"kc": 2, "target": "conv+linear"}, {"kc": 4, "m1": 3, "block_layers": "all"}]


@pytest.mark.parametrize("settings", [{}, {"m1": 3}, *BLOCKS])
def test_the_node_of_comfyui_makes_the_change(tmp_path, monkeypatch, settings):
    file = write_adapter(tmp_path / "a.safetensors", tiny_base(), "atoms", **settings)
    assert export(file, "--to", "comfy", "--out", tmp_path, "--name", "x") == 0
    base = types.ModuleType("comfy.weight_adapter.base")
    base.WeightAdapterBase = object
    package, comfy = types.ModuleType("comfy.weight_adapter"), types.ModuleType("comfy")
    package.adapters, comfy.weight_adapter = [], package
    for module in (comfy, package, base):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("node", tmp_path / "comfyui_sd_atoms.py")
    node = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)
    (adapter,) = package.adapters
    state, pipe = load_file(tmp_path / "x-comfy.safetensors"), adapted(file)
    taken = set()
    for name in read_artefact(file).layers:
        layer = pipe.unet.get_submodule(name)
        patch = adapter.load(kohya_module("unet", name), state, None, None, taken)
        made = patch.calculate_weight(layer.base_weight.clone(), name, 0.5, 1.0, None, lambda change: change)
        assert torch.allclose(made, layer.base_weight + 0.5 * layer.get_delta_weight("default"), atol=1e-6)
    assert taken == set(state)
    assert adapter.load("lora_unet_x", state, None, None) is None


def test_block_atoms_for_comfyui_add_up_where_they_are_of_one_size(tmp_path, capsys):
    files = [
        write_adapter(tmp_path / f"{number}.safetensors", tiny_base(), "atoms", kc=kc, m=m, tokens=(), target=target)
        for number, (kc, m, target) in enumerate([(2, 9, "conv+linear"), (2, 0, "attn"), (4, 9, "conv+linear")])
    ]
    assert export(f"{files[0]},{files[1]}", "--to", "comfy", "--out", tmp_path, "--name", "both") == 0
    assert float(re.search(r"its change differs by (\S+) of itself", capsys.readouterr().out)[1]) < 1e-6
    assert export(tmp_path / "both-comfy.safetensors", "--to", "diff", "--out", tmp_path) == 2
    assert "block atoms for ComfyUI" in capsys.readouterr().err
    assert export(f"{files[0]},{files[2]}") == 0
    assert export(f"{files[0]},{files[2]}", "--to", "comfy", "--out", tmp_path, "--name", "apart") == 2
    assert "--to comfy: block atoms of several sizes have no matrix in common" in capsys.readouterr().err


def test_another_base_is_refused_unless_asked_for(files, tmp_path, capsys):
    pipe = open_base(tiny_base())
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.5)
    pipe.save_pretrained(tmp_path / "other")
    words = (files("atoms"), "--base", tmp_path / "other", "--to", "diff", "--out", tmp_path)
    assert export(*words) == 2
    assert "whose weights differ from this base's by about" in capsys.readouterr().err
    assert export(*words, "--other_base") == 0
    assert "expect a weaker likeness" in capsys.readouterr().err


def test_rows_of_one_word_are_one_file(tmp_path):
    tokens = (TOKEN, f"{TOKEN}_1", "<canal_7>")
    file = write_adapter(tmp_path / "a.safetensors", tiny_base(), "token", tokens=tokens)
    assert export(file, "--to", "words", "--out", tmp_path) == 0
    rows = read_artefact(file).tokens
    word = load_file(tmp_path / "castle-atoms.safetensors")["emb_params"]
    assert torch.equal(word, torch.stack([rows[TOKEN], rows[f"{TOKEN}_1"]]).half())
    assert torch.equal(load_file(tmp_path / "canal_7-atoms.safetensors")["emb_params"], rows["<canal_7>"][None].half())


def test_nothing_is_overwritten(files, tmp_path, capsys):
    words = (files("atoms"), "--to", "words,diff", "--out", tmp_path, "--name", "x")
    (tmp_path / "castle-atoms.safetensors").write_text("mine")
    assert export(*words) == 2
    assert capsys.readouterr().err.count("exists; pass --overwrite") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["castle-atoms.safetensors"]
    assert (tmp_path / "castle-atoms.safetensors").read_text() == "mine"
    assert export(*words, "--overwrite") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "lora,ckpt"), "--to lora,ckpt: 'ckpt' is not one of comfy"),
        (("--to", "diff", "--lossy_rank", "2"), "--lossy_rank is only for --to lora"),
        (("--strength", "a"), "--strength a: numbers"),
        (("--strength", "nan"), "--strength nan: finite numbers"),
        (("--strength", "inf"), "--strength inf: finite numbers"),
        (("--strength", "1,2"), "--strength 1,2: 2 for 1 adapters"),
    ],
)
def test_mistakes_are_one_line(files, tmp_path, capsys, words, message):
    assert export(files("atoms"), *words, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_text_encoder_in_plain_diffusers(tmp_path):
    pipe = open_base(tiny_base())
    attention = "encoder.layers.0.self_attn"
    for names in (
        [f"{attention}.q_proj"],
        [f"{attention}.v_proj", TEXT],
        [f"{attention}.q_proj", f"{attention}.out_proj"],
    ):
        made = {name: lora(pipe.text_encoder.get_submodule(name).weight.detach(), alpha=4.0) for name in names}
        source = kohya_file(tmp_path / "a.safetensors", {}, {name: parts for name, (parts, _) in made.items()})
        to = ("--to", "lora", "--dtype", "fp32", "--out", tmp_path, "--name", "x", "--overwrite")
        assert export(source, "--base", tiny_base(), *to) == 0
        plain = StableDiffusionPipeline.from_pretrained(tiny_base(), safety_checker=None)
        before = {name: plain.text_encoder.get_submodule(name).weight.detach().clone() for name in names}
        plain.load_lora_weights(str(tmp_path), weight_name="x-lora.safetensors")
        plain.fuse_lora(components=["text_encoder"])
        for name, (_, change) in made.items():
            found = plain.text_encoder.get_submodule(name).weight.detach() - before[name]
            assert torch.allclose(found.double(), change, atol=1e-5), name
        assert read_artefact(tmp_path / "x-lora.safetensors").text_layers == sorted(names)


@pytest.mark.parametrize("method", ["atoms", "lora", "bitfit"])
def test_sizes_that_are_told_are_those_of_the_files(files, tmp_path, method, capsys):
    assert export(files(method)) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:7]]
    told = {row[0]: float(row[1]) * {"bytes": 1, "KB": 1e3, "MB": 1e6}[row[2]] for row in rows if row[1] != "-"}
    assert export(files(method), "--to", ",".join(told), "--out", tmp_path, "--name", "x") == 0
    for kind, size in told.items():
        names = "castle-atoms.*" if kind == "words" else f"x-{kind}*"
        written = [path for path in tmp_path.glob(names) if path.is_file()]
        written += (tmp_path / "x-checkpoint").rglob("*.safetensors") if kind == "checkpoint" else []
        written += [tmp_path / "comfyui_sd_atoms.py"] if kind == "comfy" else []
        found = sum(path.stat().st_size for path in written)
        # three digits are told; a checkpoint of so few numbers is names for a good part, and a file has longer ones
        assert abs(found - size) <= (0.2 if kind == "checkpoint" else 0.006) * found, (kind, found, size)


def test_names_strengths_and_words_are_told(files, tmp_path, capsys):
    one, two = files("atoms"), files("lora")
    both = f"{one},{two}"
    assert export(both, "--to", "diff", "--out", tmp_path, "--name", "a b") == 0
    said = capsys.readouterr().out
    assert "the files are called a_b, since 'a b'" in said
    assert f"{TOKEN}: words are in none of these files; --to words writes them" in said
    assert export(both, "--to", "diff", "--out", tmp_path) == 0
    assert (tmp_path / "atoms+lora-diff.safetensors").exists()
    assert export(f"{one},{one}", "--to", "diff", "--out", tmp_path) == 2
    assert f"{one}: the same adapter as {one}; name it once" in capsys.readouterr().err
    assert export(one, "--strength", "0", "--to", "diff", "--out", tmp_path) == 2
    assert "--to diff: at a strength of 0 nothing is changed" in capsys.readouterr().err
    assert export(one, "--to", "checkpoint", "--out", tmp_path, "--name", "x") == 0
    said = capsys.readouterr().out
    assert f"the same for diffusers, with {TOKEN} in the tokenizer" in said
    assert f"{TOKEN}: words are in none of these files (but for the folder); --to words" in said
    silent = write_adapter(tmp_path / "silent.safetensors", tiny_base(), "atoms", tokens=())
    assert export(silent, "--to", "checkpoint", "--out", tmp_path, "--name", "y") == 0
    assert "tokenizer" not in capsys.readouterr().out
