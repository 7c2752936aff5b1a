"""What people do to a pipeline before and after adapters are loaded into it."""

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd_atoms import AtomsConfig, UserError, load_atoms, save_atoms
from sd_atoms.methods import get_method
from sd_atoms.methods.adapters import add_adapter
from sd_atoms.pipeline import load_adapter, open_base, save_adapter
from sd_atoms.pipeline.scales import scales_by_layer
from sd_atoms.pipeline.tokens import add_placeholder_tokens
from sd_atoms.tuner import AtomsLayer
from tests.tiny import write_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def tiny(base):
    return open_base(str(base))


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """Two adapters for one word."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed in (1, 2):
        pipe, generator = open_base(str(base)), torch.Generator().manual_seed(seed)
        add_placeholder_tokens(pipe, {"<castle>": torch.randn(16, generator=generator)})
        pipe.unet.add_adapter(AtomsConfig(m=9))
        for layer in pipe.unet.modules():
            if isinstance(layer, AtomsLayer):
                delta = layer.atoms_delta["default"]
                delta.data.add_(0.1 * torch.randn(delta.shape, generator=generator))
        save_atoms(pipe, folder / f"{seed}.safetensors", tokens=["<castle>"])
    return folder / "1.safetensors", folder / "2.safetensors"


def draw(pipe, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    with torch.no_grad():
        ids = pipe.tokenizer("a <castle>", padding="max_length", return_tensors="pt").input_ids
        return pipe.unet(latents, 10, pipe.text_encoder(ids)[0].to(dtype)).sample


def compiled(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compiled_in_place(pipe):
    pipe.unet.compile(backend="eager")


def cast(pipe):
    pipe.to(torch.bfloat16)


def layerwise(pipe):
    pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)


def offloaded(pipe):
    """What `enable_sequential_cpu_offload` does to a part, which wants another device."""
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


def offloaded_by_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offloaded_by_block(pipe):
    where = dict(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    pipe.unet.enable_group_offload(**where, offload_type="block_level", num_blocks_per_group=1)


def offloaded_by_leaf(pipe):
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"),
                                   offload_type="leaf_level")  # fmt: skip


def fused(pipe):
    pipe.fuse_lora()


def fused_and_back(pipe):
    pipe.fuse_lora()
    pipe.unfuse_lora()


SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in (compiled, compiled_in_place)]
OFFLOADED = [offloaded, offloaded_by_model, offloaded_by_block, offloaded_by_leaf]
MORE_METHODS = [pytest.param(name, marks=pytest.mark.slow) for name in ("lokr", "lora-conv", "bitfit")]
WAYS = [*SLOW, cast, layerwise, *OFFLOADED, fused, fused_and_back, copy.deepcopy]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: getattr(way, "__name__", None))
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_picture_is_the_plain_ways_or_one_line_says_what_to_do(way, when, tiny, files):
    plain = copy.deepcopy(tiny)
    load_atoms(plain, files[0])
    expected = draw(plain)
    if when == "before" and way in (fused, fused_and_back):
        pytest.skip("nothing is there to fuse")
    try:
        if when == "after":
            load_atoms(tiny, files[0])
        tiny = way(tiny) or tiny
        if when == "before":
            load_atoms(tiny, files[0])
        got = draw(tiny, tiny.unet.dtype if way is cast else torch.float32)
    except UserError as error:
        if not ((way, when) == (offloaded, "before") or way is offloaded_by_leaf) or "\n" in str(error):
            raise
        return
    assert way is not offloaded_by_leaf
    tolerance = 0.05 if way in (cast, layerwise) else 1e-5
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("way", [layerwise, *OFFLOADED], ids=lambda way: way.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["lora", "loha", *MORE_METHODS])
def test_other_methods_go_the_same_ways(method, way, when, tiny, base, tmp_path):
    plain = open_base(str(base))
    add_placeholder_tokens(plain, {"<castle>": torch.ones(16)})
    untouched = draw(plain)
    torch.manual_seed(0)
    for parameter in add_adapter(plain.unet, get_method(method).make_config(plain.unet, {})):
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    file = save_adapter(plain, tmp_path / "a.safetensors", tokens=["<castle>"], about={"method": method})
    expected = draw(plain)
    try:
        if when == "after":
            load_adapter(tiny, file)
        way(tiny)
        if when == "before":
            load_adapter(tiny, file)
        got = draw(tiny)
    except UserError as error:
        of_peft = method in ("lora", "loha", "lokr")  # which call the base layer
        if "\n" in str(error) or way not in (offloaded, offloaded_by_leaf) or (of_peft and when == "after"):
            raise
        return
    assert (got - expected).norm() <= (0.05 if way is layerwise else 1e-5) * expected.norm()
    assert (got - expected).norm() < 0.2 * (got - untouched).norm()


def test_what_was_loaded_shows_itself_in_one_line(tiny, files):
    shown = repr(load_atoms(tiny, files[0]))
    assert shown == f"<Artefact {files[0]}, atoms: 20 modules, 1,620 parameters, tokens <castle>, base unknown>"


def test_a_compiled_network_is_saved_swapped_and_loaded_as_the_plain_one(tiny, files, tmp_path):
    compiled(tiny)
    load_atoms(tiny, files[0])
    file = save_atoms(tiny, tmp_path / "again.safetensors", tokens=["<castle>"])
    assert all(torch.equal(value, load_file(files[0])[key]) for key, value in load_file(file).items())
    assert not any(
        "_orig_mod" in key for key in load_file(save_atoms(tiny, tmp_path / "a") / "adapter_model.safetensors")
    )
    load_atoms(tiny, files[1], hotswap=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unfusing_gives_the_bits_of_the_base_in_its_present_dtype(tiny, files, dtype):
    original = {name: value.to(dtype) for name, value in tiny.unet.state_dict().items()}
    load_atoms(tiny, files[0])
    tiny.fuse_lora()
    tiny.to(dtype)
    tiny.unfuse_lora()
    weights = {name.replace("base_layer.", ""): value for name, value in tiny.unet.state_dict().items()}
    assert all(torch.equal(weights[name], value) for name, value in original.items())
    tiny.fuse_lora()
    tiny.to(torch.float32)
    tiny.unet.disable_adapters()
    assert draw(tiny).isfinite().all()


def test_a_deleted_adapters_word_may_come_with_another_row(tiny, files, base):
    load_atoms(tiny, files[0], "first")
    with pytest.raises(UserError, match="another embedding"):
        load_atoms(tiny, files[1], "second")
    tiny.delete_adapters("first")
    load_atoms(tiny, files[1], "second")
    plain = open_base(str(base))
    load_atoms(plain, files[1])
    assert torch.equal(draw(tiny), draw(plain))


def test_an_offloaded_network_says_in_which_order_to_load(tiny, files):
    offloaded(tiny)
    with pytest.raises(UserError, match="unet: it is offloaded"):
        load_atoms(tiny, files[0])
    remove_hook_from_submodules(tiny.unet)
    load_atoms(tiny, files[0])


def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(tiny, files, tmp_path):
    load_atoms(tiny, files[0])
    next(layer for layer in tiny.unet.modules() if isinstance(layer, AtomsLayer)).atoms_delta["default"].data[0] = (
        torch.nan
    )
    with pytest.raises(UserError, match="not finite .*atoms_delta"):
        save_atoms(tiny, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["atoms_delta", "atoms_initial", "token."])
def test_a_file_with_numbers_that_are_not_finite_is_not_loaded(part, tiny, files, tmp_path):
    tensors = load_file(files[0])
    key = next(key for key in tensors if key.startswith(part))
    tensors[key].view(-1)[0] = torch.inf
    with safe_open(files[0], "pt") as file:
        save_file(tensors, tmp_path / "a.safetensors", file.metadata())
    with pytest.raises(UserError, match=r"a\.safetensors: 1 of its .* not finite"):
        load_atoms(tiny, tmp_path / "a.safetensors")
    assert not hasattr(tiny.unet, "peft_config")
    assert "<castle>" not in tiny.tokenizer.get_vocab()


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "40KB"}], ids=["whole", "shards"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_only_variant_of_a_folder_is_opened_in_shards_too(tiny, tmp_path, variant, shards):
    tiny.save_pretrained(tmp_path / "base", variant=variant, **shards)
    assert (len(list((tmp_path / "base" / "unet").glob("*.safetensors"))) > 1) == bool(shards)
    opened = open_base(str(tmp_path / "base"))
    for part in ("unet", "vae", "text_encoder"):
        own, expected = (getattr(pipe, part).state_dict() for pipe in (opened, tiny))
        assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())


def test_bases_of_other_forms_are_named_with_what_helps(tiny, tmp_path):
    for name, message in (("model.safetensors", "corrupt"), ("model.ckpt", "only .safetensors files are read")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=message):
            open_base(str(tmp_path / name))
    for variant in ("bf16", "fp16"):
        tiny.save_pretrained(tmp_path / "half", variant=variant)
    with pytest.raises(UserError, match="--variant bf16"):
        open_base(str(tmp_path / "half"))
    tiny.save_pretrained(tmp_path / "mute")
    for file in (tmp_path / "mute" / "tokenizer").iterdir():
        file.unlink()
    (tmp_path / "mute" / "tokenizer").rmdir()
    with pytest.raises(UserError, match="lacks tokenizer/"):
        open_base(str(tmp_path / "mute"))


def test_several_adapters_deletion_and_reloading_leave_the_picture(tiny, files):
    load_atoms(tiny, files[0])
    expected = draw(tiny)
    tiny.unet.add_adapter(AtomsConfig(m=4), "beside")
    tiny.unet.set_adapters(["default", "beside"], [1.0, 0.7])
    assert torch.equal(draw(tiny), expected)  # the other one changes nothing yet
    tiny.delete_adapters("beside")
    assert torch.equal(draw(tiny), expected)
    tiny.delete_adapters("default")
    load_atoms(tiny, files[0])
    assert torch.equal(draw(tiny), expected)
    tiny.unload_lora_weights()
    load_atoms(tiny, files[0])
    assert torch.equal(draw(tiny), expected)


def test_a_pipeline_saved_with_fused_adapters_is_the_merged_one(tiny, files, tmp_path):
    load_atoms(tiny, files[0])
    expected = draw(tiny)
    tiny.fuse_lora()
    tiny.unload_lora_weights()
    tiny.save_pretrained(tmp_path / "merged")
    merged = open_base(str(tmp_path / "merged"))
    assert (draw(merged) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ({"down": 0.5}, {"down_blocks": 0.5}),
        ({"mid": 2.0, "up": {"block_1": 0.25}}, {"mid_block": 2.0, "up_blocks.1": 0.25}),
        (
            {"up": {"block_0": [0.25, 0.75]}},
            {"up_blocks.0.resnets.0": 0.25, "up_blocks.0.resnets.1": 0.75, "up_blocks.0.upsamplers": 0.75},
        ),
    ],
)
def test_strengths_by_block_hold_for_every_layer_of_it(tiny, files, scales, expected):
    load_atoms(tiny, files[0], "a")
    plain = copy.deepcopy(tiny)
    tiny.set_adapters(["a"], [{"unet": scales}])
    for name, layer in plain.unet.named_modules():
        if isinstance(layer, AtomsLayer):
            layer.set_scale("a", next((scale for start, scale in expected.items() if name.startswith(start)), 1.0))
    expected = draw(plain)
    # a copy's weights lie elsewhere, by which BLAS picks its kernels
    assert (draw(tiny) - expected).norm() <= 1e-5 * expected.norm()
    tiny.set_adapters(["a"], [1.0])
    assert (draw(tiny) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("scales", [{"dawn": 1.0}, {"up": {"block_7": 1.0}}, {"up": [1.0] * 5}, {"mid": "strong"}])
def test_strengths_of_blocks_that_are_not_there_are_one_line(tiny, files, scales):
    load_atoms(tiny, files[0], "a")
    with pytest.raises(UserError, match="^strengths by block: [^\n]*$"):
        tiny.set_adapters(["a"], [{"unet": scales}])


def test_strengths_by_block_of_adapters_of_the_attention_alone_are_diffusers(tiny):
    tiny.unet.add_adapter(LoraConfig(target_modules=["to_q"]), "a")
    expected = _maybe_expand_lora_scales(tiny.unet, [{"down": 0.5}, 0.3])
    assert scales_by_layer(tiny.unet, [{"down": 0.5}, 0.3]) == expected
