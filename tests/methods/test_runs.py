"""Every method through the door: trained by the command, saved, loaded, resumed, merged, shared, on a tiny base."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny import one_core, write_photos, write_tiny_base

import sd_atoms
from sd_atoms.cli import main, train_main
from sd_atoms.errors import AtomsWarning, UserError
from sd_atoms.generation import Request, generate
from sd_atoms.methods import all_methods
from sd_atoms.methods.adapters import adapters_off, merge_adapters, set_adapters, tuner_layers, unmerge_adapters
from sd_atoms.pipeline import open_base, read_artefact
from sd_atoms.pipeline.sampling import Sampling

METHODS = list(all_methods())
PUT_IN = [name for name in METHODS if name != "token"]
# steps that show: the usual rates of a few steps change no pixel
RATES = dict.fromkeys(METHODS, 0.02) | {"full": 1e-3}
WORDS = {
    "initializer_token": "castle", "placeholder_token": "<castle>", "instance_prompt": "photo of a <castle>",
    "train_batch_size": 1, "lr_warmup_steps": 0, "num_instance_images": 1, "num_inference_steps": 2,
    "report_to": "none", "max_train_steps": 4, "checkpointing_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    with one_core():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the base and the photos."""
    folder = tmp_path_factory.mktemp("runs")
    write_tiny_base(folder / "tiny")
    write_photos(folder / "photos")
    return folder


def words(place, method, out, **settings):
    values = {
        **WORDS, "pretrained_model_name_or_path": place / "tiny", "instance_data_dir": place / "photos",
        "method": method, "learning_rate": RATES.get(method, 0.02), "output_dir": out, **settings,
    }  # fmt: skip
    flags = ["--train_token_embedding"]
    for name, value in values.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)] if value is not None else []
    return flags


@pytest.fixture(scope="module")
def trained(place):
    """method -> its run folder, trained once."""
    made = {}

    def run(method):
        if method not in made:
            made[method] = place / method
            assert train_main(words(place, method, place / method)) == 0
        return made[method]

    return run


def opened(place, **settings):
    return open_base(str(place / "tiny"), **settings)


def drawn(pipe, prompt="photo of a <castle>"):
    sampling = Sampling(7.5, 2, "ddim", None)
    return np.asarray(next(iter(generate(pipe, [Request(prompt, 0, "")], sampling)))[1])


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_draws_what_the_training_drew_and_off_is_the_base(place, trained, method):
    run = trained(method)
    expected = np.asarray(Image.open(run / "images" / "instance-00.png"))
    base = drawn(opened(place), "photo of a castle")
    for source in (run / "castle.safetensors", run / "adapter", run):
        pipe = opened(place)
        artefact = sd_atoms.load_adapter(pipe, source)
        assert artefact.method == method
        assert (drawn(pipe) == expected).all(), source
        with adapters_off(pipe.unet, pipe.text_encoder):
            assert (drawn(pipe, "photo of a castle") == base).all()
    if method != "token":
        pipe.unet.delete_adapters("default")
        assert (drawn(pipe, "photo of a castle") == base).all()
        moved = [key for key, value in read_artefact(run).state.items() if value.any()]
        assert moved


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_one_that_never_stopped(place, trained, tmp_path, method):
    whole = trained(method)
    assert train_main(words(place, method, tmp_path / "run", max_train_steps=2, lr_scheduler="constant")) == 0
    again = ["--resume_from_checkpoint", "latest"]
    assert train_main([*words(place, method, tmp_path / "run", lr_scheduler="constant"), *again]) == 0
    assert train_main(words(place, method, tmp_path / "whole", lr_scheduler="constant")) == 0
    one, other = (load_file(tmp_path / name / "castle.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert one.keys() == load_file(whole / "castle.safetensors").keys()


@pytest.mark.parametrize("method", PUT_IN)
def test_merged_is_unmerged_and_comes_back_bit_for_bit(place, trained, method):
    pipe = opened(place)
    sd_atoms.load_adapter(pipe, trained(method))
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    inputs = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.randn(1, 5, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        plain = pipe.unet(*inputs).sample
        originals = merge_adapters(pipe.unet)
        merged = pipe.unet(*inputs).sample
        unmerge_adapters(pipe.unet, originals)
    assert (merged - plain).norm() <= 1e-5 * plain.norm()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize("method", PUT_IN)
def test_plain_peft_reads_the_adapter_folder(place, trained, method):
    pipe, plain = opened(place), opened(place)
    sd_atoms.load_adapter(pipe, trained(method))
    unet = PeftModel.from_pretrained(plain.unet, str(trained(method) / "adapter"))
    inputs = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.randn(1, 5, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        assert torch.equal(unet(*inputs).sample, pipe.unet(*inputs).sample)


@pytest.mark.parametrize(("method", "alpha"), [("lora", None), ("lora", 2.0), ("locon", None), ("locon", 8.0)])
def test_plain_diffusers_reads_a_lora_file(place, tmp_path, method, alpha):
    assert train_main(words(place, method, tmp_path / "run", alpha=alpha)) == 0
    pipe, plain = opened(place), StableDiffusionPipeline.from_pretrained(place / "tiny", safety_checker=None)
    artefact = sd_atoms.load_adapter(pipe, tmp_path / "run" / "castle.safetensors")
    plain.load_lora_weights(str(tmp_path / "run"), weight_name="castle.safetensors")
    plain.set_progress_bar_config(disable=True)
    sd_atoms.pipeline.add_placeholder_tokens(plain, artefact.tokens)
    assert (drawn(plain) == drawn(pipe)).all()
    assert (drawn(plain) != drawn(opened(place), "photo of a castle")).any()


@pytest.mark.parametrize("method", PUT_IN)
def test_two_adapters_work_side_by_side_with_strengths(place, trained, method):
    pipe = opened(place)
    for name in ("one", "two"):
        sd_atoms.load_adapter(pipe, trained(method), name)
    inputs = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.randn(1, 5, pipe.unet.config.cross_attention_dim)
    if method == "oft":
        with pytest.raises(UserError, match="OFT has no strength, only 1 is allowed"):
            set_adapters(pipe.unet, ["one", "two"], [0.5, 0.5])
        return
    with torch.no_grad():
        set_adapters(pipe.unet, ["one"], [1.0])
        alone = pipe.unet(*inputs).sample
        set_adapters(pipe.unet, ["one", "two"], [0.25, 0.75])
        both = pipe.unet(*inputs).sample
    if all_methods()[method].linear:
        assert (both - alone).norm() <= 1e-5 * alone.norm()
    else:
        assert (both - alone).any()


@pytest.mark.parametrize("method", PUT_IN)
def test_half_precision_bases_train_float32(place, tmp_path, method):
    assert train_main(words(place, method, tmp_path / "run", mixed_precision="bf16", max_train_steps=2)) == 0
    assert {value.dtype for value in load_file(tmp_path / "run/castle.safetensors").values()} == {torch.float32}
    pipe = opened(place, dtype=torch.bfloat16)
    sd_atoms.load_adapter(pipe, tmp_path / "run")
    own = [p for layer in tuner_layers(pipe.unet).values() for part in layer.adapter_layer_names
           for p in getattr(layer, part).parameters()]  # fmt: skip
    assert {parameter.dtype for parameter in own} == {torch.float32}
    assert drawn(pipe).shape == (64, 64, 3)


@pytest.mark.parametrize("method", METHODS)
def test_the_other_commands_take_it(place, trained, tmp_path, capsys, method):
    run, base = trained(method), drawn(opened(place), "a castle in snow")
    (tmp_path / "one.txt").write_text("a {} in snow\n")
    out = tmp_path / "out"
    draw = [
        "generate",
        "--adapter",
        str(run),
        "--prompts",
        str(tmp_path / "one.txt"),
        "--seeds",
        "0",
        "--compare_base",
    ]
    assert main([*draw, "--out", str(out)]) == 0
    assert (np.asarray(Image.open(out / "base-prompt00-seed0.png")) == base).all()
    assert main(["share", str(run)]) == 0
    card = (run / "share" / "README.md").read_text()
    assert ("load_atoms(pipe" if method == "atoms" else "load_adapter(pipe") in card
    assert sd_atoms.load_adapter(opened(place), run / "share").method == method
    code = main(["inspect", str(run)])
    assert code == (2 if method == "token" else 0)
    printed = capsys.readouterr()
    assert "changes no layer of the UNet" in printed.err if method == "token" else "|ΔF|/|F|" in printed.out
    assert main(["doctor", *words(place, method, tmp_path / "new")]) == 0
    (tmp_path / "unrelated.txt").write_text("a barn\n")
    drift = ["drift", "--adapter", str(run), "--prompts", str(tmp_path / "unrelated.txt"), "--seeds", "0"]
    assert main([*drift, "--clip_model_name_or_path", "pocket:clip"]) == 0


@pytest.mark.parametrize("method", ["atoms", "lora"])
def test_base_pictures_are_of_the_base_also_with_a_text_encoder_part(place, tmp_path, method):
    run = tmp_path / "run"
    rates = dict(text_learning_rate=0.5, text_adapter=method)
    assert train_main(words(place, method, run, train_text_encoder=True, **rates)) == 0
    (tmp_path / "one.txt").write_text("a {} in snow\n")
    draw = [
        "generate",
        "--adapter",
        str(run),
        "--prompts",
        str(tmp_path / "one.txt"),
        "--seeds",
        "0",
        "--compare_base",
    ]
    assert main([*draw, "--base_token", "castle", "--out", str(tmp_path / "out")]) == 0
    found = np.asarray(Image.open(tmp_path / "out" / "base-prompt00-seed0.png"))
    assert (found == drawn(opened(place), "a castle in snow")).all()
    assert (np.asarray(Image.open(run / "images" / "base-instance-00.png"))
            == drawn(opened(place), "photo of a castle")).all()  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_another_base_is_refused_or_warned_of(place, trained, method):
    if method == "token":
        return
    pipe = opened(place)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    if all_methods()[method].portable:
        with pytest.warns(AtomsWarning, match="whose weights differ"):
            sd_atoms.load_adapter(pipe, trained(method))
    else:
        with pytest.raises(UserError, match=f"what method {method} trains means nothing there"):
            sd_atoms.load_adapter(pipe, trained(method))


def test_load_atoms_takes_atoms_alone(place, trained):
    assert sd_atoms.load_atoms(opened(place), trained("atoms")).is_atoms
    with pytest.raises(UserError, match="its method is lora, not atoms; load_adapter takes it"):
        sd_atoms.load_atoms(opened(place), trained("lora"))


def test_a_budget_chooses_the_size_and_the_same_flags_go_on(place, tmp_path, capsys):
    budget = dict(budget="3k", max_train_steps=2)
    assert train_main(words(place, "lora", tmp_path / "run", **budget)) == 0
    assert "budget: {'rank':" in capsys.readouterr().out
    count = json.loads((tmp_path / "run" / "metrics.json").read_text())["training"]["trained_numbers"]
    assert 2000 <= count <= 4500
    again = words(place, "lora", tmp_path / "run", budget="3k", max_train_steps=4)
    assert train_main([*again, "--resume_from_checkpoint", "latest"]) == 0
    assert train_main(words(place, "lora", tmp_path / "other", budget="3")) == 2
    assert "comes no nearer than" in capsys.readouterr().err
    assert train_main(words(place, "lora", tmp_path / "other", budget="many")) == 2
    assert "budget: 'many' is no number of parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        dict(peft_type="IA3", target_modules=["to_k", "to_v"], feedforward_modules=[]),
        dict(peft_type="FOURIERFT", target_modules=["to_k", "to_v"], n_frequency=20, init_weights=True),
    ],
    ids=lambda config: config["peft_type"],
)
def test_any_tuner_of_peft_trains_by_its_config(place, tmp_path, capsys, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = words(place, "atoms", tmp_path / "run", peft_config=tmp_path / "config.json")
    assert train_main(flags) == 0
    pipe = opened(place)
    sd_atoms.load_adapter(pipe, tmp_path / "run" / "castle.safetensors")
    assert (drawn(pipe) == np.asarray(Image.open(tmp_path / "run/images/instance-00.png"))).all()
    without = words(place, "atoms", tmp_path / "b", peft_config=tmp_path / "config.json", learning_rate=None)
    assert train_main(without) == 2
    assert "learning_rate is required: method peft-" in capsys.readouterr().err


def test_settings_of_another_method_are_refused_by_name(place, tmp_path, capsys):
    assert train_main(words(place, "lora", tmp_path / "run", m1=4)) == 2
    assert "m1: a setting of atoms, not of method lora" in capsys.readouterr().err
    assert train_main(words(place, "difffit", tmp_path / "run", target="attn")) == 2
    assert "method difffit has no target to choose" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"],
                                               rank_pattern={"to_k": 2}), IA3Config(target_modules=["to_v"],
                                               feedforward_modules=[])], ids=["lora", "ia3"])  # fmt: skip
def test_folders_of_plain_peft_load(place, tmp_path, config):
    pipe, plain = opened(place), opened(place)
    adapted = get_peft_model(plain.unet, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    adapted.save_pretrained(tmp_path / "plain")
    sd_atoms.load_adapter(pipe, tmp_path / "plain")
    inputs = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.randn(1, 5, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        assert torch.equal(pipe.unet(*inputs).sample, adapted(*inputs).sample)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in ("lora", "bitfit") else pytest.mark.slow) for name in METHODS]
)
def test_a_new_process_draws_the_same(place, trained, tmp_path, method):
    code = (
        "import sys, sd_atoms; from sd_atoms.pipeline import open_base; from sd_atoms.generation import *; "
        "from sd_atoms.pipeline.sampling import Sampling; import torch; torch.set_num_threads(1); "
        "pipe = open_base(sys.argv[1]); sd_atoms.load_adapter(pipe, sys.argv[2]); "
        "[(_, image)] = generate(pipe, [Request('photo of a <castle>', 0, '')], Sampling(7.5, 2)); "
        "image.save(sys.argv[3])"
    )
    out = tmp_path / "image.png"
    subprocess.run([sys.executable, "-c", code, place / "tiny", trained(method), out], check=True)
    expected = np.asarray(Image.open(trained(method) / "images" / "instance-00.png"))
    assert (np.asarray(Image.open(out)) == expected).all()
