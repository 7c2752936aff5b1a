"""Adapters on the text encoder travel with those of the UNet."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd_atoms import AtomsConfig, UserError, load_atoms, save_atoms
from sd_atoms.methods.adapters import add_adapter
from sd_atoms.pipeline import read_artefact
from sd_atoms.pipeline.artefact_files import write_artefact
from sd_atoms.pipeline.tokens import add_placeholder_tokens, check_new_token
from sd_atoms.tuner import AtomsLayer

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
KINDS = {
    "atoms": lambda **other: AtomsConfig(**dict(m=0, kc=4, target_modules=ATTENTION) | other),
    "lora": lambda **other: LoraConfig(**dict(r=4, lora_alpha=4, target_modules=ATTENTION) | other),
}
PROMPT = "photo of a castle in the snow"


def learned(pipe, kind=None, seed=1, token="<castle>", adapter="default", **text_settings):
    """Gives `pipe` adapters that do something, on the text encoder too if `kind` says so, and a placeholder."""
    generator = torch.Generator().manual_seed(seed)
    add_placeholder_tokens(pipe, {token: torch.randn(128, generator=generator)})
    pipe.unet.add_adapter(AtomsConfig(m=4, target_modules=["conv_in", "mid_block.resnets.0.conv1"]), adapter)
    if kind is not None:
        add_adapter(pipe.text_encoder, KINDS[kind](**text_settings), adapter)
    for model in (pipe.unet, pipe.text_encoder):
        for name, parameter in model.named_parameters():
            if name.endswith((f"_delta.{adapter}", f"lora_B.{adapter}.weight", f"lora_A.{adapter}.weight")):
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return pipe


def own_copy(pocket):
    own = copy.copy(pocket)
    for name in ("unet", "text_encoder", "tokenizer"):
        own.register_modules(**{name: copy.deepcopy(getattr(pocket, name))})
    return own


@pytest.fixture
def fresh(pocket):
    return own_copy(pocket)


def states(pipe, prompt=PROMPT):
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def draw(pipe, prompt=PROMPT):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="latent").images


def everything(pipe):
    """All that loading could change, as comparable copies."""
    return (
        {key: value.clone() for key, value in pipe.unet.state_dict().items()},
        {key: value.clone() for key, value in pipe.text_encoder.state_dict().items()},
        [dict(getattr(module, "scaling", {})) for module in pipe.text_encoder.modules()],
        [getattr(module, "active_adapters", None) for module in [*pipe.unet.modules(), *pipe.text_encoder.modules()]],
        [sorted(getattr(part, "peft_config", {})) for part in (pipe.unet, pipe.text_encoder)],
        pipe.tokenizer.get_vocab(),
    )


def same(before, after):
    tensors = all(
        list(old) == list(new) and all(torch.equal(old[key], new[key]) for key in old)
        for old, new in zip(before[:2], after[:2], strict=True)
    )
    return tensors and before[2:] == after[2:]


def header(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["sd_atoms"])


# Saved and loaded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["adapter", "adapter.safetensors"])
def test_states_and_pictures_are_the_same_bit_for_bit(pipe, fresh, pocket, tmp_path, kind, place):
    path = save_atoms(learned(pipe, kind), tmp_path / place, tokens=["<castle>"])
    artefact = load_atoms(fresh, path, "castle")
    assert torch.equal(states(fresh, "a <castle>"), states(pipe, "a <castle>"))
    assert not torch.equal(states(fresh), states(pocket))
    assert torch.equal(draw(fresh), draw(pipe))
    assert len(artefact.text_layers) == 16
    assert artefact.source == str(path)
    assert fresh.get_list_adapters() == {"unet": ["castle"], "text_encoder": ["castle"]}
    assert fresh.get_active_adapters() == ["castle"]


@pytest.mark.parametrize("kind", KINDS)
def test_folder_and_file_hold_the_same(pipe, tmp_path, kind):
    learned(pipe, kind)
    folder = read_artefact(save_atoms(pipe, tmp_path / "a"))
    file = read_artefact(save_atoms(pipe, tmp_path / "a.safetensors"))
    assert folder.digest() == file.digest()
    assert folder.about == file.about
    assert folder.about["text_encoder"]["peft_type"] == {"atoms": "FILTER_ATOMS", "lora": "LORA"}[kind]
    assert sorted(folder.text_state) == sorted(file.text_state)
    without = read_artefact(write_artefact(read_artefact(tmp_path / "a"), tmp_path / "again"))
    assert without.digest() == folder.digest()
    key = next(iter(folder.text_state))
    folder.text_state[key][0, 0] += 1
    assert folder.digest() != file.digest()


def test_a_lora_of_another_alpha_is_another_adapter(pipe, fresh, tmp_path):
    learned(pipe, "lora")
    learned(fresh, "lora", lora_alpha=8)
    digests = [read_artefact(save_atoms(p, tmp_path / "a.safetensors")).digest() for p in (pipe, fresh)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(pipe, fresh, tmp_path, kind):
    learned(pipe, kind)
    file = save_atoms(pipe, tmp_path / "a.safetensors", dtype="fp16")
    assert file.stat().st_size < save_atoms(pipe, tmp_path / "b.safetensors").stat().st_size
    load_atoms(fresh, file)
    torch.testing.assert_close(states(fresh), states(pipe), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_float32_in_a_half_precision_base(pipe, fresh, pocket, tmp_path, kind):
    file = save_atoms(learned(pipe, kind), tmp_path / "a.safetensors")
    fresh.text_encoder.to(torch.bfloat16)
    load_atoms(fresh, file, "castle")
    adapter = [p for name, p in fresh.text_encoder.named_parameters() if "castle" in name]
    assert {p.dtype for p in adapter} == {torch.float32}
    assert states(fresh).dtype == torch.bfloat16
    moved = (states(pipe) - states(pocket)).norm()
    assert (states(fresh).float() - states(pipe)).norm() < 0.5 * moved


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model_loads_the_sub_folder_and_its_own_loads_here(pipe, fresh, pocket, tmp_path, kind):
    folder = save_atoms(learned(pipe, kind), tmp_path / "a")
    model = PeftModel.from_pretrained(copy.deepcopy(pocket.text_encoder), folder / "text_encoder")
    ids = pocket.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids)[0], states(pipe))
    model.save_pretrained(folder / "text_encoder")
    load_atoms(fresh, folder)
    assert torch.equal(states(fresh), states(pipe))


def test_every_setting_of_lora_that_counts_is_kept(pipe, fresh, tmp_path):
    settings = dict(
        r=4,
        lora_alpha=3,
        rank_pattern={r".*layers\.0\.self_attn\.q_proj": 2},
        alpha_pattern={r".*layers\.[12]\..*": 7},
        use_rslora=True,
        target_modules=r".*\.(q_proj|fc1)",
    )
    learned(pipe, "lora", **settings)
    for place in ("a", "a.safetensors"):
        other = own_copy(fresh)
        load_atoms(other, save_atoms(pipe, tmp_path / place))
        assert torch.equal(states(other), states(pipe))


def test_a_folder_written_over_another_keeps_nothing_of_it(pipe, fresh, tmp_path):
    save_atoms(learned(fresh, "lora"), tmp_path / "a", tokens=["<castle>"])
    artefact = read_artefact(save_atoms(learned(pipe), tmp_path / "a"))
    assert (artefact.text_config, artefact.text_state, artefact.tokens) == (None, {}, {})


def test_without_a_part_for_the_text_encoder_nothing_of_it_is_written(pipe, fresh, tmp_path):
    file = save_atoms(learned(pipe), tmp_path / "a.safetensors", tokens=["<castle>"])
    folder = save_atoms(pipe, tmp_path / "a", tokens=["<castle>"])
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "learned_embeds.safetensors",
    }  # fmt: skip
    assert list(header(file)) == ["fingerprint", "versions", "format", "config", "layers"]
    assert sorted(load_file(file)) == ["atoms_delta.4x9", "atoms_initial.4x9", "token.<castle>"]
    with_part = read_artefact(save_atoms(learned(fresh, "atoms"), tmp_path / "b.safetensors", tokens=["<castle>"]))
    again = write_artefact(replace(with_part, text_config=None, text_state={}), tmp_path / "c.safetensors")
    assert header(again) == header(file)
    assert read_artefact(again).digest() == read_artefact(file).digest()


# The switches of diffusers


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipelines_own_switches_work_on_both_parts(pipe, fresh, pocket, tmp_path, kind):
    load_atoms(fresh, save_atoms(learned(pipe, kind), tmp_path / "castle"), "castle")
    other = learned(own_copy(pocket), kind, seed=2, token="<canal>")
    load_atoms(fresh, save_atoms(other, tmp_path / "canal", tokens=["<canal>"]), "canal")
    base = states(pocket)
    castle, canal = states(pipe), states(other)
    assert torch.equal(states(fresh), canal)
    assert torch.equal(draw(fresh), draw(other))

    fresh.set_adapters("castle")
    assert torch.equal(states(fresh), castle)
    fresh.set_adapters("castle", 0.0)
    torch.testing.assert_close(states(fresh), base, rtol=1e-4, atol=1e-5)
    fresh.set_adapters(["castle", "canal"], [{"unet": 1.0, "text_encoder": 0.5}, 0.25])
    layer = fresh.text_encoder.encoder.layers[0].self_attn.q_proj
    assert layer.scaling == {"castle": 0.5, "canal": 0.25}
    both = states(fresh)

    fresh.disable_lora()
    assert torch.equal(states(fresh), base)
    assert torch.equal(draw(fresh), draw(pocket))
    fresh.enable_lora()
    assert torch.equal(states(fresh), both)

    weight = layer.get_base_layer().weight.detach().clone()
    merged = weight + layer.get_delta_weight("castle") + layer.get_delta_weight("canal")
    fresh.fuse_lora()
    torch.testing.assert_close(layer.get_base_layer().weight, merged)
    torch.testing.assert_close(states(fresh), both, rtol=1e-4, atol=1e-4)
    fresh.unfuse_lora()
    if kind == "atoms":  # PEFT's LoRA subtracts what it had added
        assert torch.equal(layer.get_base_layer().weight, weight)
        assert torch.equal(states(fresh), both)
    torch.testing.assert_close(states(fresh), both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_deleted_from_both_parts_and_can_come_again(pipe, fresh, pocket, tmp_path, kind):
    folder = save_atoms(learned(pipe, kind), tmp_path / "castle")
    other_kind = next(name for name in KINDS if name != kind)
    other = learned(own_copy(pocket), other_kind, seed=2, token="<canal>")
    load_atoms(fresh, folder, "castle")
    load_atoms(fresh, folder, "again")
    fresh.delete_adapters("again")
    fresh.set_adapters("castle")
    assert torch.equal(states(fresh), states(pipe))
    fresh.delete_adapters("castle")
    assert fresh.get_list_adapters().get("text_encoder", []) == []
    assert torch.equal(states(fresh), states(pocket))
    load_atoms(fresh, folder, "castle")
    assert torch.equal(draw(fresh), draw(pipe))
    fresh.delete_adapters("castle")
    load_atoms(fresh, save_atoms(other, tmp_path / "canal"), "canal")  # another kind, where nothing is left of the old
    assert torch.equal(states(fresh), states(other))
    fresh.unload_lora_weights()
    parameters = zip(fresh.text_encoder.named_parameters(), pocket.text_encoder.named_parameters(), strict=True)
    assert all(ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]) for ours, theirs in parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_without_a_part_for_the_text_encoder_silences_the_others_there(pipe, fresh, pocket, tmp_path, kind):
    load_atoms(fresh, save_atoms(learned(pipe, kind), tmp_path / "castle"), "castle")
    plain = learned(own_copy(pocket), token="<canal>")
    load_atoms(fresh, save_atoms(plain, tmp_path / "canal"), "canal")
    assert torch.equal(states(fresh), states(pocket))
    assert torch.equal(draw(fresh), draw(plain))
    fresh.set_adapters(["castle", "canal"])
    assert torch.equal(states(fresh), states(pipe))


@pytest.mark.parametrize("kind", KINDS)
def test_cross_attention_kwargs_scale_both_parts(pipe, tmp_path, kind):
    learned(pipe, kind)
    before = draw(pipe)
    half = pipe(
        PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent",
        cross_attention_kwargs={"scale": 0.5},
    ).images  # fmt: skip
    assert not torch.equal(half, before)
    assert torch.equal(draw(pipe), before)


# Hot-swapping


@pytest.mark.parametrize(
    ("kind", "bigger", "smaller"),
    [
        ("atoms", {}, {}),
        ("atoms", {}, dict(target_modules=["q_proj"], scale_pattern={".*": 0.5})),
        ("lora", {}, {}),
        ("lora", dict(lora_alpha=16), dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"])),
        ("lora", dict(use_rslora=True), dict(r=3, alpha_pattern={"v_proj": 5})),
    ],
)
def test_a_hot_swap_gives_the_numbers_of_a_fresh_load_and_moves_nothing(
    pipe, fresh, pocket, tmp_path, kind, bigger, smaller
):
    castle = save_atoms(learned(pipe, kind, **bigger), tmp_path / "castle", tokens=["<castle>"])
    other = learned(own_copy(pocket), kind, seed=2, token="<canal>", **smaller)
    canal = save_atoms(other, tmp_path / "canal", tokens=["<canal>"])
    load_atoms(fresh, castle, "concept")
    places = {name: value.data_ptr() for name, value in fresh.text_encoder.named_parameters() if "concept" in name}
    load_atoms(fresh, canal, "concept", hotswap=True)
    exact = smaller == {} or kind == "atoms"  # products of padded matrices may be summed in another order
    tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states(fresh, "a <canal>"), states(other, "a <canal>"), **tolerance)
    assert {n: v.data_ptr() for n, v in fresh.text_encoder.named_parameters() if "concept" in n} == places

    fresh.set_adapters("concept", 0.5)
    other.set_adapters("default", 0.5)
    torch.testing.assert_close(states(fresh), states(other), rtol=1e-5, atol=1e-5)
    load_atoms(fresh, castle, "concept", hotswap=True)  # the strength stays
    pipe.set_adapters("default", 0.5)
    torch.testing.assert_close(states(fresh), states(pipe), rtol=1e-5, atol=1e-5)

    load_atoms(fresh, canal, "concept", hotswap=True)
    if kind == "lora":  # what was swapped in can be saved
        load_atoms(own := own_copy(pocket), save_atoms(fresh, tmp_path / "saved", "concept"))
        other.set_adapters("default", 1.0)
        torch.testing.assert_close(states(own), states(other), rtol=1e-5, atol=1e-5)


def test_a_loaded_artefact_stays_as_it_was_read(pipe, fresh, pocket, tmp_path):
    artefact = read_artefact(save_atoms(learned(pipe, "lora"), tmp_path / "a"))
    other = save_atoms(learned(own_copy(pocket), "lora", lora_alpha=9, r=2), tmp_path / "b")
    load_atoms(fresh, artefact)
    digest = artefact.digest()
    load_atoms(fresh, other, hotswap=True)
    assert artefact.digest() == digest
    assert artefact.text_config.alpha_pattern == {}


MISFITS = {
    "nothing for something": (
        "atoms",
        {},
        None,
        {},
        "has nothing for the text encoder .* has FILTER_ATOMS there",
    ),
    "something for nothing": (None, {}, "lora", {}, "has LORA for the text encoder .* which has nothing there"),
    "another kind": ("atoms", {}, "lora", {}, "has LORA for the text encoder .* which has FILTER_ATOMS there"),
    "a higher rank": ("lora", {}, "lora", dict(r=5), "32 of its tensors do not fit into 'concept': "),
    "more layers": ("lora", dict(target_modules=["q_proj"]), "lora", {}, "into nothing"),
    "larger blocks": ("atoms", {}, "atoms", dict(kc=8), "kc=8 cannot be swapped"),
    "more layers of atoms": ("atoms", dict(target_modules=["q_proj"]), "atoms", {}, "into nothing"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_cannot_be_swapped_is_one_error_and_changes_nothing(pipe, fresh, pocket, tmp_path, name):
    kind, settings, new_kind, new_settings, message = MISFITS[name]
    load_atoms(fresh, save_atoms(learned(pipe, kind, **settings), tmp_path / "a", tokens=["<castle>"]), "concept")
    other = learned(own_copy(pocket), new_kind, seed=2, token="<canal>", **new_settings)
    file = save_atoms(other, tmp_path / "canal.safetensors", tokens=["<canal>"])
    before = everything(fresh)
    with pytest.raises(UserError, match=message) as caught:
        load_atoms(fresh, file, "concept", hotswap=True)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)
    assert same(before, everything(fresh))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_swapped_into_fused_weights(pipe, fresh, tmp_path, kind):
    folder = save_atoms(learned(pipe, kind), tmp_path / "a")
    load_atoms(fresh, folder)
    fresh.fuse_lora(components=["text_encoder"])
    before = everything(fresh)
    with pytest.raises(UserError, match="while adapters are merged"):
        load_atoms(fresh, folder, hotswap=True)
    assert same(before, everything(fresh))


def test_a_token_row_that_does_not_fit_is_found_before_numbers_are_written(pipe, fresh, tmp_path):
    file = save_atoms(learned(pipe, "atoms"), tmp_path / "a.safetensors", tokens=["<castle>"])
    load_atoms(fresh, file)
    rows = {"<castle>": torch.ones(128), "<new>": torch.zeros(64)}
    narrow = replace(read_artefact(file), tokens=rows)
    before = everything(fresh)
    for hotswap, name in ((True, "default"), (False, "other")):
        with pytest.raises(UserError, match="token <"):
            load_atoms(fresh, narrow, name, hotswap=hotswap)
        assert same(before, everything(fresh))


# Misfits


def refused(pipe, path, message, name="castle"):
    before = everything(pipe)
    with pytest.raises(UserError, match=message) as caught:
        load_atoms(pipe, path, name)
    assert "\n" not in str(caught.value)
    assert same(before, everything(pipe))


@pytest.mark.parametrize("kind", KINDS)
def test_another_text_encoder_is_an_error_that_names_layers_and_changes_nothing(pipe, fresh, tmp_path, kind):
    file = save_atoms(learned(pipe, kind), tmp_path / "a.safetensors", tokens=["<castle>"])
    small = copy.deepcopy(fresh.text_encoder.config)
    small.num_hidden_layers = 2
    fresh.register_modules(text_encoder=type(fresh.text_encoder)(small))
    refused(fresh, file, r"8 of its 16 layers do not fit this base's text encoder \(encoder\.layers\.2\.self_attn")
    narrow = copy.deepcopy(small)
    narrow.hidden_size, narrow.num_hidden_layers = 64, 4
    fresh.register_modules(text_encoder=type(fresh.text_encoder)(narrow))
    message = "16 of its 16 layers do not fit this base's text" if kind == "lora" else "takes 64"
    refused(fresh, file, message)  # blocks of 4 × 4 channels fit any width
    fresh.register_modules(text_encoder=None)
    with pytest.raises(UserError, match="a part for the text encoder, which this pipeline lacks"):
        load_atoms(fresh, file)
    assert not hasattr(fresh.unet, "peft_config")


def test_a_token_conflict_leaves_the_pipeline_as_it_was(pipe, fresh, tmp_path):
    file = save_atoms(learned(pipe, "lora"), tmp_path / "a.safetensors", tokens=["<castle>"])
    add_placeholder_tokens(fresh, {"<castle>": torch.zeros(128)})
    refused(fresh, file, "token <castle>: the pipeline has it already with another embedding")


@pytest.mark.parametrize("kind", KINDS)
def test_two_kinds_in_one_layer_are_refused(pipe, fresh, pocket, tmp_path, kind):
    load_atoms(fresh, save_atoms(learned(pipe, kind), tmp_path / "a"), "first")
    other = learned(own_copy(pocket), next(name for name in KINDS if name != kind), token="<canal>")
    refused(fresh, save_atoms(other, tmp_path / "b"), "16 of its layers carry adapters of another kind")


def test_a_name_that_only_the_text_encoder_has_is_taken(pipe, fresh, tmp_path):
    folder = save_atoms(learned(pipe), tmp_path / "a")
    add_adapter(fresh.text_encoder, KINDS["lora"](), "castle")
    refused(fresh, folder, "'castle' is loaded already")


def spoil(path, change):
    """Rewrites a file with other tensors or another header."""
    tensors, metadata = load_file(path), {"format": "pt"}
    with safe_open(path, "pt") as file:
        metadata |= file.metadata()
    about = json.loads(metadata["sd_atoms"]) if "sd_atoms" in metadata else {}
    change(tensors, about)
    if about:
        metadata["sd_atoms"] = json.dumps(about)
    save_file(tensors, path, metadata=metadata)


def first(tensors, end):
    return next(key for key in tensors if key.startswith("text_encoder.") and key.endswith(end))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("atoms", lambda t, a: a["text_encoder"].update(peft_type="NONE"), "peft_type is 'NONE'; one of LORA"),
        ("atoms", lambda t, a: a["text_encoder"].update(peft_type="LOHA"), "lacks or does not know"),
        ("atoms", lambda t, a: a["text_encoder"].update(kc=-1), "kc=-1"),
        ("atoms", lambda t, a: a.update(text_encoder="x"), "header and its tensors do not fit"),
        ("atoms", lambda t, a: a.update(text_encoder={}), "peft_type is None"),
        ("atoms", lambda t, a: a.pop("text_encoder"), "header and its tensors do not fit"),
        ("atoms", lambda t, a: t.pop(first(t, "_initial")), "corrupt, it lacks or does not know encoder"),
        (
            "atoms",
            lambda t, a: [t.pop(k) for k in [*t] if k.startswith("text")],
            "it lacks or does not know any atoms",
        ),
        ("lora", lambda t, a: t.pop(first(t, "lora_A.weight")), "corrupt, it lacks .*lora_A.weight"),
        ("lora", lambda t, a: t.pop(first(t, "lora_B.weight")), "corrupt, it lacks .*lora_B.weight"),
        ("lora", lambda t, a: t.update({"text_encoder.x.weight": torch.zeros(1)}), "do not fit"),
        ("lora", lambda t, a: a["text_encoder"].update(use_dora=True), "corrupt, it lacks .*lora_magnitude_vector"),
        ("lora", lambda t, a: a["text_encoder"].update(r=0), "`r` should be a positive integer"),
        ("lora", lambda t, a: a["text_encoder"].update(r=8), "16 of its 16 layers do not fit"),
        ("lora", lambda t, a: a["text_encoder"].update(rank_pattern=[1]), "does not fit this base's text encoder"),
        ("lora", lambda t, a: a["text_encoder"].update(lora_alpha="x"), "does not fit this base's text encoder"),
    ],
)
def test_a_broken_file_is_one_clear_error(pipe, fresh, tmp_path, kind, change, message):
    file = save_atoms(learned(pipe, kind), tmp_path / "a.safetensors")
    spoil(file, change)
    refused(fresh, file, rf"a\.safetensors: .*{message}")


def test_a_broken_folder_is_one_clear_error(pipe, fresh, tmp_path):
    folder = save_atoms(learned(pipe, "lora"), tmp_path / "a") / "text_encoder"
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good_config, good_weights = config.read_text(), weights.read_bytes()

    settings = json.loads(good_config) | {"use_dora": True}
    config.write_text(json.dumps(settings))
    refused(fresh, tmp_path / "a", "a: corrupt, it lacks or does not know 16 tensors")
    config.write_text("{")
    refused(fresh, tmp_path / "a", r"text_encoder/adapter_config\.json: missing or not a JSON object")
    config.write_text(good_config)

    spoil(weights, lambda tensors, about: tensors.pop(next(key for key in tensors if "lora_B" in key)))
    refused(fresh, tmp_path / "a", "a: corrupt, it lacks")
    weights.write_bytes(good_weights[: len(good_weights) // 2])
    refused(fresh, tmp_path / "a", r"text_encoder/adapter_model\.safetensors: corrupt or not a safetensors file")
    weights.unlink()
    refused(fresh, tmp_path / "a", r"text_encoder: not an adapter folder, adapter_model\.safetensors is missing")
    torch.save({}, folder / "adapter_model.bin")
    refused(fresh, tmp_path / "a", "text_encoder/adapter_model.bin: pickles can run code")
    (folder / "adapter_model.bin").unlink()
    config.unlink()
    refused(fresh, tmp_path / "a", "its header and the folder text_encoder beside it do not fit")


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False),
    ],
    ids=["LoHa", "DoRA", "LoRA with biases"],
)
@pytest.mark.parametrize("place", ["adapter", "adapter.safetensors"])
def test_any_tuner_of_peft_on_the_text_encoder_is_kept_whole(pipe, fresh, pocket, tmp_path, config, place):
    add_adapter(learned(pipe).text_encoder, copy.deepcopy(config))
    load_atoms(fresh, save_atoms(pipe, tmp_path / place))
    assert torch.equal(states(fresh), states(pipe))
    assert not torch.equal(states(fresh), states(pocket))


def test_an_artefact_in_memory_keeps_the_name_of_its_file(pipe, fresh, tmp_path):
    artefact = read_artefact(save_atoms(learned(pipe), tmp_path / "a.safetensors"))
    fresh.register_modules(unet=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(UserError, match=r"a\.safetensors: made for another architecture"):
        load_atoms(fresh, artefact)


# Adding, and tokens


@pytest.mark.parametrize(("kind", "layer_type"), [("atoms", AtomsLayer), ("lora", LoraLayer)])
def test_an_added_adapter_is_active_and_trains(pipe, kind, layer_type):
    pipe.text_encoder.requires_grad_(False)
    add_adapter(pipe.text_encoder, KINDS[kind]())
    layers = [module for module in pipe.text_encoder.modules() if isinstance(module, layer_type)]
    assert {tuple(layer.active_adapters) for layer in layers} == {("default",)}
    trained = {name for name, parameter in pipe.text_encoder.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("_delta.default" in name or ".lora_" in name for name in trained)


def test_tokens_come_to_a_text_encoder_that_has_adapters(pipe, fresh, pocket, tmp_path):
    load_atoms(fresh, save_atoms(learned(pipe, "atoms"), tmp_path / "a", tokens=["<castle>"]), "castle")
    other = learned(own_copy(pocket), "atoms", seed=2, token="<canal>")
    load_atoms(fresh, save_atoms(other, tmp_path / "b", tokens=["<canal>"]), "canal")
    assert torch.equal(states(fresh, "a <canal>"), states(other, "a <canal>"))
    fresh.set_adapters("castle")
    assert torch.equal(states(fresh, "a <castle>"), states(pipe, "a <castle>"))


def test_new_tokens_stand_apart_from_each_other(pipe):
    for token in ("<a>", "<b>"):
        check_new_token(pipe, token, ["<a>", "<b>"])
    with pytest.raises(UserError, match="placeholder_token: '<a>' comes twice"):
        check_new_token(pipe, "<a>", ["<a>", "<A>"])
    with pytest.raises(UserError, match="placeholder_token: 'xq' is a part of 'xqz'"):
        check_new_token(pipe, "xq", ["xqz", "xq"])
    check_new_token(pipe, "xqz", ["xqz", "xq"])
    add_placeholder_tokens(pipe, {"<a>": torch.zeros(128)})
    with pytest.raises(UserError, match="'<A>' exists in the base model's vocabulary"):
        check_new_token(pipe, "<A>")
    with pytest.raises(UserError, match="token <a>: this pipeline has no text encoder"):
        add_placeholder_tokens(SimpleNamespace(tokenizer=pipe.tokenizer, text_encoder=None), {"<a>": torch.zeros(128)})
