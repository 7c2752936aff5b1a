"""Adapters between a pipeline and the disk."""

import copy
import errno
import json
import os
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from sd_atoms import AtomsConfig, UserError, load_atoms, save_atoms
from sd_atoms.pipeline import open_base, read_artefact
from sd_atoms.pipeline.fingerprint import distance, fingerprint
from sd_atoms.pipeline.tokens import add_placeholder_tokens, check_new_token, initializer_row
from sd_atoms.tuner import AtomsLayer


def out(unet, inputs):
    with torch.no_grad():
        return unet(*inputs).sample


def learned(pipe, seed=1, size=0.05, token="<castle>", adapter="default"):
    """Gives `pipe` an adapter that does something and a placeholder with a row of its own."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(128, generator=generator)
    add_placeholder_tokens(pipe, {token: row})
    pipe.unet.add_adapter(AtomsConfig(m=9), adapter)
    for layer in pipe.unet.modules():
        if isinstance(layer, AtomsLayer):
            delta = layer.atoms_delta[adapter]
            delta.data.add_(size * torch.randn(delta.shape, generator=generator))
    return pipe


@pytest.fixture
def saved(pipe, tmp_path, unet_inputs):
    """(folder, file, output of the UNet) of a learned adapter."""
    learned(pipe)
    folder = save_atoms(pipe, tmp_path / "adapter", tokens=["<castle>"], about={"base": "pocket"})
    file = save_atoms(pipe, tmp_path / "castle.safetensors", tokens=["<castle>"], about={"base": "pocket"})
    return folder, file, out(pipe.unet, unet_inputs)


def test_a_word_that_the_pipeline_lacks_is_not_saved(pipe, tmp_path):
    with pytest.raises(UserError, match="token <cxx>: the pipeline has no such word"):
        save_atoms(pipe, tmp_path / "a.safetensors", tokens=["<cxx>"])
    assert not (tmp_path / "a.safetensors").exists()


@pytest.fixture
def fresh(pocket):
    own = copy.copy(pocket)
    for name in ("unet", "text_encoder", "tokenizer"):
        own.register_modules(**{name: copy.deepcopy(getattr(pocket, name))})
    return own


@pytest.mark.parametrize("which", [0, 1], ids=["folder", "file"])
def test_a_loaded_adapter_gives_the_same_numbers_bit_for_bit(saved, fresh, unet_inputs, which, monkeypatch):
    monkeypatch.setattr("sd_atoms.tuner.layer.svd_atoms", None)  # loading must not decompose
    artefact = load_atoms(fresh, saved[which], "castle")
    assert torch.equal(out(fresh.unet, unet_inputs), saved[2])
    assert artefact.about["base"] == "pocket"


def test_the_placeholder_comes_along_and_every_other_row_stays(saved, fresh, pocket, pipe):
    load_atoms(fresh, saved[1])
    ids = fresh.tokenizer("photo of a <castle>.").input_ids
    token_id = fresh.tokenizer.convert_tokens_to_ids("<castle>")
    assert token_id in ids
    weight = fresh.text_encoder.get_input_embeddings().weight
    assert torch.equal(weight[token_id], pipe.text_encoder.get_input_embeddings().weight[token_id])
    assert torch.equal(weight[:token_id], pocket.text_encoder.get_input_embeddings().weight)
    load_atoms(fresh, saved[0], "again")  # the same token with the same row is no conflict


def test_folder_and_file_hold_the_same(saved):
    folder, file = read_artefact(saved[0]), read_artefact(saved[1])
    assert folder.digest() == file.digest()
    assert folder.about == file.about
    assert (folder.config.m, folder.config.solver) == (file.config.m, file.config.solver) == (9, "svd")


def test_sizes(pipe, tmp_path):
    learned(pipe)
    file = save_atoms(pipe, tmp_path / "a.safetensors")
    folder = save_atoms(pipe, tmp_path / "a")
    half = save_atoms(pipe, tmp_path / "half.safetensors", dtype="fp16")
    assert file.stat().st_size < 25_000
    assert sum(path.stat().st_size for path in folder.iterdir()) < 40_000
    assert half.stat().st_size < 15_000


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_files_are_close_and_load_as_float32(pipe, fresh, tmp_path, unet_inputs, dtype):
    learned(pipe)
    load_atoms(fresh, save_atoms(pipe, tmp_path / "a.safetensors", dtype=dtype))
    change = out(pipe.unet, unet_inputs) - out(fresh.unet, unet_inputs)
    assert change.norm() / out(pipe.unet, unet_inputs).norm() < 0.02
    assert {p.dtype for name, p in fresh.unet.named_parameters() if "atoms_" in name} == {torch.float32}


def test_a_peft_model_loads_the_folder(saved, pocket, unet_inputs):
    model = PeftModel.from_pretrained(copy.deepcopy(pocket.unet), saved[0])
    assert torch.equal(out(model, unet_inputs), saved[2])


def test_a_folder_written_by_peft_loads(pocket, fresh, tmp_path, unet_inputs, saved):
    PeftModel.from_pretrained(copy.deepcopy(pocket.unet), saved[0]).save_pretrained(tmp_path / "by_peft")
    load_atoms(fresh, tmp_path / "by_peft")
    assert torch.equal(out(fresh.unet, unet_inputs), saved[2])


def test_the_pipelines_own_switches_work(saved, fresh, pocket, tmp_path, unet_inputs):
    base = out(pocket.unet, unet_inputs)
    other = copy.deepcopy(pocket)
    learned(other, seed=9, token="<canal>", adapter="canal")
    canal = save_atoms(other, tmp_path / "canal.safetensors", "canal", tokens=["<canal>"])
    load_atoms(fresh, saved[1], "castle")
    load_atoms(fresh, canal, "canal")
    assert torch.equal(out(fresh.unet, unet_inputs), out(other.unet, unet_inputs))  # the last loaded is active

    fresh.set_adapters(["castle", "canal"], [1.0, 0.5])
    both = out(fresh.unet, unet_inputs)
    layer = fresh.unet.conv_in
    merged = layer.base_weight + layer.get_delta_weight("castle") + layer.get_delta_weight("canal")
    assert layer.scaling == {"castle": 1.0, "canal": 0.5}

    fresh.disable_lora()
    assert torch.equal(out(fresh.unet, unet_inputs), base)
    fresh.enable_lora()
    assert torch.equal(out(fresh.unet, unet_inputs), both)

    fresh.fuse_lora()
    torch.testing.assert_close(layer.get_base_layer().weight, merged, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out(fresh.unet, unet_inputs), both, rtol=1e-3, atol=1e-4)
    fresh.unfuse_lora()
    assert torch.equal(out(fresh.unet, unet_inputs), both)
    assert torch.equal(layer.base_weight, pocket.unet.conv_in.weight)

    fresh.set_adapters("castle")
    assert torch.equal(out(fresh.unet, unet_inputs), saved[2])
    fresh.delete_adapters("canal")
    assert fresh.get_list_adapters() == {"unet": ["castle"]}
    assert torch.equal(out(fresh.unet, unet_inputs), saved[2])
    fresh.unload_lora_weights()
    assert torch.equal(out(fresh.unet, unet_inputs), base)
    assert all(torch.equal(a, b) for a, b in zip(fresh.unet.parameters(), pocket.unet.parameters(), strict=True))


def test_a_hot_swap_gives_the_numbers_of_a_fresh_load_and_moves_nothing(saved, fresh, pocket, tmp_path, unet_inputs):
    other = copy.deepcopy(pocket)
    learned(other, seed=9, token="<canal>", adapter="canal")
    canal = save_atoms(other, tmp_path / "canal.safetensors", "canal", tokens=["<canal>"])
    load_atoms(fresh, saved[1], "concept")
    places = {name: value.data_ptr() for name, value in fresh.unet.named_parameters()}
    load_atoms(fresh, canal, "concept", hotswap=True)
    assert torch.equal(out(fresh.unet, unet_inputs), out(other.unet, unet_inputs))
    assert {"<castle>", "<canal>"} <= set(fresh.tokenizer.get_vocab())
    load_atoms(fresh, saved[0], "concept", hotswap=True)
    assert torch.equal(out(fresh.unet, unet_inputs), saved[2])
    assert {name: value.data_ptr() for name, value in fresh.unet.named_parameters()} == places
    with pytest.raises(UserError, match="'absent' is not loaded, so nothing can be swapped"):
        load_atoms(fresh, canal, "absent", hotswap=True)


MODES = {
    "overcomplete": dict(m1=2),
    "frozen β": dict(m1=2, train_beta=False),
    "blocks": dict(kc=2, target_modules="attn"),
    "both, everywhere": dict(m1=2, kc=2, block_layers="all", target_modules="conv", exclude_modules=["conv_in"]),
    "sparse": dict(solver="sparse", m=11),
    "of many sizes": dict(target_modules="conv", m_pattern={"conv_shortcut|proj_in|proj_out": 1, "conv_in": 4}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["adapter", "adapter.safetensors"])
def test_every_mode_is_saved_and_loaded(mode, place, fresh, pocket, tmp_path, unet_inputs):
    trained = copy.deepcopy(pocket)
    trained.unet.add_adapter(AtomsConfig(**MODES[mode], init_weights=False))
    path = save_atoms(trained, tmp_path / place)
    load_atoms(fresh, path)
    assert torch.equal(out(fresh.unet, unet_inputs), out(trained.unet, unet_inputs))
    assert not torch.equal(out(fresh.unet, unet_inputs), out(pocket.unet, unet_inputs))


def test_an_adapter_joins_a_lora_in_one_pipeline(saved, fresh, unet_inputs):
    fresh.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")
    load_atoms(fresh, saved[1], "castle")
    fresh.set_adapters(["castle", "lora"])
    assert torch.equal(out(fresh.unet, unet_inputs), saved[2])  # a new LoRA changes nothing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_copies_of_a_base_count_as_the_same(saved, fresh, dtype):
    fresh.unet.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_atoms(fresh, saved[1])


@pytest.mark.parametrize("size", [0.02, 0.3])
def test_another_fine_tune_of_the_base_warns_with_its_distance(saved, fresh, size):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in fresh.unet.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * size * parameter.norm() / noise.norm())
    with pytest.warns(UserWarning, match="differ from this pipeline's by about") as caught:
        load_atoms(fresh, saved[1])
    told = float(str(caught[0].message).split("about ")[1].split("%")[0]) / 100
    assert size / 3 < told < 3 * size


def test_fingerprint_distance_of_scaled_and_zero_weights():
    weight = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    assert distance(fingerprint([weight]), fingerprint([weight])) == 0
    assert distance(fingerprint([weight]), fingerprint([1.1 * weight])) == pytest.approx(0.1, rel=0.3)
    assert distance(fingerprint([torch.zeros(4, 4, 3, 3)]), fingerprint([torch.zeros(4, 4, 3, 3)])) == 0


def test_another_architecture_is_an_error_that_names_layers_and_changes_nothing(saved, fresh):
    narrow = dict(fresh.unet.config) | {"block_out_channels": (32, 64)}
    narrow |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    narrow |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    fresh.register_modules(unet=type(fresh.unet).from_config(narrow))
    with pytest.raises(
        UserError, match=r"another architecture, \d+ of its 28 layers do not fit this base \(down_blocks"
    ):
        load_atoms(fresh, saved[1])
    assert "<castle>" not in fresh.tokenizer.get_vocab()
    assert not any(isinstance(module, AtomsLayer) for module in fresh.unet.modules())


def test_zero_matching_layers_is_an_error(saved, fresh):
    fresh.register_modules(unet=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(UserError, match="28 of its 28 layers do not fit"):
        load_atoms(fresh, saved[1])


def corrupt(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        path.write_bytes(os.urandom(2000))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "header without layers":
        save_file({"x": torch.zeros(1)}, path, metadata={"sd_atoms": json.dumps({"format": 1, "config": {"m": 9}})})
    elif how == "header not JSON":
        save_file({"x": torch.zeros(1)}, path, metadata={"sd_atoms": "{"})
    elif how == "header with half a character":
        with safe_open(path, "pt") as file:
            header = file.metadata()["sd_atoms"].replace('{"', '{"note":"\\ud800","', 1)
        save_file(load_file(path), path, metadata={"format": "pt", "sd_atoms": header})
    elif how == "missing tensors":
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({k: v for k, v in tensors.items() if "initial" not in k}, path, metadata=metadata)
    elif how == "foreign":
        save_file({"lora_unet_conv_in.lora_up.weight": torch.zeros(1)}, path)
    elif how == "format in words":
        save_file({"x": torch.zeros(1)}, path, metadata={"sd_atoms": json.dumps({"format": "one"})})
    elif how == "newer format":
        save_file({"x": torch.zeros(1)}, path, metadata={"sd_atoms": json.dumps({"format": 99})})


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "garbage",
        "empty",
        "header without layers",
        "header not JSON",
        "header with half a character",
        "missing tensors",
        "foreign",
        "format in words",
        "newer format",
    ],
)
def test_a_broken_file_is_one_clear_error(saved, fresh, how):
    corrupt(saved[1], how)
    with pytest.raises(UserError, match=r"castle\.safetensors: ") as caught:
        load_atoms(fresh, saved[1])
    assert "\n" not in str(caught.value)
    assert not hasattr(fresh.unet, "peft_config")


def test_pickles_are_refused(tmp_path, fresh):
    torch.save({"a": torch.zeros(1)}, tmp_path / "adapter.bin")
    with pytest.raises(UserError, match="only .safetensors files are read; pickles"):
        load_atoms(fresh, tmp_path / "adapter.bin")
    (tmp_path / "folder").mkdir()
    torch.save({}, tmp_path / "folder" / "adapter_model.bin")
    with pytest.raises(UserError, match="pickles can run code"):
        load_atoms(fresh, tmp_path / "folder")


def test_a_lora_folder_is_named_as_such(tmp_path, fresh, pocket):
    from peft import get_peft_model

    get_peft_model(copy.deepcopy(pocket.unet), LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its method is peft-lora, not atoms; load_adapter takes it"):
        load_atoms(fresh, tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/path", "neither an existing path nor a hub id"),
        ("./nowhere", "neither an existing path nor a hub id"),
        ("somebody/castle-atoms", "the hub did not provide it"),
    ],
)
def test_sources_that_are_not_there(fresh, source, message):
    with pytest.raises(UserError, match=message):
        load_atoms(fresh, source)


@pytest.mark.parametrize("name", ["v1.5", ""])
def test_adapter_names_that_peft_cannot_store(saved, fresh, name):
    with pytest.raises(UserError, match="must be a word without dots"):
        load_atoms(fresh, saved[1], name)


def test_a_name_that_is_taken(saved, fresh):
    load_atoms(fresh, saved[1])
    with pytest.raises(UserError, match="'default' is loaded already"):
        load_atoms(fresh, saved[1])


def test_a_token_with_another_row_is_a_conflict(saved, fresh):
    add_placeholder_tokens(fresh, {"<castle>": torch.zeros(128)})
    with pytest.raises(UserError, match="token <castle>: the pipeline has it already with another embedding"):
        load_atoms(fresh, saved[1])


def test_saving_what_is_not_there(pipe, tmp_path):
    with pytest.raises(UserError, match="'castle' is not loaded; there are none"):
        save_atoms(pipe, tmp_path / "x", "castle")
    learned(pipe)
    with pytest.raises(UserError, match="dtype: 'int8' is not one of"):
        save_atoms(pipe, tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_full_disk_leaves_the_old_file_whole(saved, pipe, monkeypatch, where):
    target = saved[1] if where == "file" else saved[0]
    watched = saved[1] if where == "file" else saved[0] / "adapter_model.safetensors"
    before = watched.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left on the disk; nothing was overwritten"):
        save_atoms(pipe, target)
    assert watched.read_bytes() == before
    assert not [path for path in watched.parent.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_recognised_in_what_the_safetensors_library_says(monkeypatch, pipe, tmp_path):
    learned(pipe)

    def full(tensors, path, metadata):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sd_atoms.pipeline.artefact_files.save_file", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        save_atoms(pipe, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_base_models_that_cannot_be_opened(tmp_path):
    for name, message in (
        ("nowhere/at/all", "neither an existing path nor a hub id"),
        ("CompVis/stable-diffusion-v1-4", "not in the local cache"),
        (str(tmp_path), "cannot be opened as a pipeline folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_base(name)
        assert "\n" not in str(caught.value)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(UserError, match="it is a StableDiffusionXLPipeline"):
        open_base(str(tmp_path))


def test_a_base_with_pickles_only_is_refused(pocket, tmp_path):
    pocket.save_pretrained(tmp_path, safe_serialization=True)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="safetensors"):
        open_base(str(tmp_path))


def test_tokens(pipe):
    row = initializer_row(pipe, "castle")
    assert row.shape == (128,)
    with pytest.raises(UserError, match="initializer_token: 'xyzzy' is"):
        initializer_row(pipe, "xyzzy")
    check_new_token(pipe, "<castle>")
    for token in ("castle", "Castle", "two words", "", " <x>"):
        with pytest.raises(UserError, match="placeholder_token: "):
            check_new_token(pipe, token)
    add_placeholder_tokens(pipe, {"<My-Castle>": row})
    token_id = pipe.tokenizer.convert_tokens_to_ids("<My-Castle>")
    assert token_id in pipe.tokenizer("photo of a <My-Castle>.").input_ids  # upper case survives the tokenizer
    with pytest.raises(UserError, match="takes 128"):
        add_placeholder_tokens(pipe, {"<other>": torch.zeros(64)})
