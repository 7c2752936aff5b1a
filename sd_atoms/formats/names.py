"""Names of modules in Stable Diffusion v1 and v2: those of diffusers, and what others make of them.

    diffusers   down_blocks.0.resnets.1.conv1
    mangled     down_blocks_0_resnets_1_conv1       in files of kohya, LyCORIS
    LDM         input_blocks.2.0.in_layers.2        in single-file checkpoints, ComfyUI, stable-diffusion.cpp

Names within the text encoder are those of transformers' CLIPTextModel, without its old `text_model.`.
"""

import re
from collections.abc import Callable

# words that hold an underscore of their own; everything else in a mangled name is a dot
_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_embedding", "time_emb_proj", "time_embed",
    "conv_in", "conv_out", "conv_norm_out", "conv_shortcut", "proj_in", "proj_out", "to_out", "to_q", "to_k", "to_v",
    "linear_1", "linear_2", "input_blocks", "output_blocks", "middle_block", "in_layers", "out_layers", "emb_layers",
    "skip_connection", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "layer_norm1",
    "layer_norm2", "final_layer_norm", "token_embedding", "position_embedding",
)  # fmt: skip
_MANGLED = re.compile("|".join(sorted(_WORDS, key=len, reverse=True)) + "|[a-z]*[0-9]*")
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_RESNET_BACK = {ldm: name for name, ldm in _RESNET.items()}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
_ENDS_BACK = {ldm: name for name, ldm in _ENDS.items()}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
LAYERS_PER_BLOCK = 2  # of Stable Diffusion v1 and v2


def mangled(name: str) -> str:
    """down_blocks.0.resnets.1.conv1 -> down_blocks_0_resnets_1_conv1."""
    return name.replace(".", "_")


def demangled(name: str) -> str | None:
    """The inverse of `mangled`, for names of a UNet, by diffusers or LDM, and of a text encoder; None for others."""
    words, place = [], 0
    while True:
        word = _MANGLED.match(name, place)
        place = word.end()
        if not word[0] or (place < len(name) and name[place] != "_"):
            return None
        words.append(word[0])
        if place == len(name):
            return ".".join(words)
        place += 1


def unet_to_ldm(name: str, layers_per_block: int = LAYERS_PER_BLOCK) -> str | None:
    """LDM's name of a UNet's module, in which `layers_per_block` is diffusers'; None where LDM has no such module."""
    n = layers_per_block
    if name in _ENDS:
        return _ENDS[name]
    found = _match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if found:
        side, block, kind, index, rest = found
        place = (n + 1) * int(block) + int(index)
        place = f"input_blocks.{1 + place}" if side == "down" else f"output_blocks.{place}"
        return _within(place, kind, 0 if kind == "resnets" else 1, rest)
    found = _match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if found:
        kind, index, rest = found
        return _within("middle_block", kind, 2 * int(index) + (kind == "attentions"), rest)
    found = _match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", name)
    if found:
        return f"input_blocks.{(n + 1) * (int(found[0]) + 1)}.0.op"
    found = _match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", name)
    if found:  # behind the attention, which the first block lacks
        return f"output_blocks.{(n + 1) * int(found[0]) + n}.{1 if found[0] == '0' else 2}.conv"
    return None


def _within(place: str, kind: str, index: int, rest: str) -> str | None:
    rest = _RESNET.get(rest) if kind == "resnets" else rest
    return None if rest is None else f"{place}.{index}.{rest}"


def unet_from_ldm(name: str, layers_per_block: int = LAYERS_PER_BLOCK) -> str | None:
    """The inverse of `unet_to_ldm`."""
    n = layers_per_block
    if name in _ENDS_BACK:
        return _ENDS_BACK[name]
    found = _match(r"middle_block\.(\d+)\.(.+)", name)
    if found:
        index, odd = divmod(int(found[0]), 2)
        rest = found[1] if odd else _RESNET_BACK.get(found[1])
        return None if rest is None else f"mid_block.{'attentions' if odd else 'resnets'}.{index}.{rest}"
    found = _match(r"(in|out)put_blocks\.(\d+)\.(\d+)\.(.+)", name)
    if not found:
        return None
    down = found[0] == "in"
    block, index = divmod(int(found[1]) - down, n + 1)
    side, part, rest = "down" if down else "up", found[2], found[3]
    if rest in ("op", "conv"):
        return f"{side}_blocks.{block}.{side}samplers.0.conv"
    rest = rest if part == "1" else _RESNET_BACK.get(rest)
    return (
        None if rest is None else f"{side}_blocks.{block}.{'attentions' if part == '1' else 'resnets'}.{index}.{rest}"
    )


def vae_to_ldm(name: str, blocks: int) -> str:
    """LDM's name of an AutoencoderKL's module with so many up blocks, which LDM counts from the other end."""
    rules: list[tuple[str, Callable[[re.Match], str]]] = [
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"down.{m[1]}.block.{m[2]}"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", lambda m: f"down.{m[1]}.downsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.(.+)", lambda m: f"mid.attn_1.{_VAE_ATTENTION[m[1]]}"),
        (r"conv_shortcut", lambda m: "nin_shortcut"),
        (r"conv_norm_out", lambda m: "norm_out"),
    ]
    for pattern, made in rules:
        name = re.sub(pattern, made, name)
    return name


def text_to_open_clip(name: str) -> str | None:
    """OpenCLIP's name, as in SD v2's single files, of a text encoder's module; None for q, k and v, which it joins."""
    known = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    if name in known:
        return known[name]
    found = _match(r"encoder\.layers\.(\d+)\.(.+)", name)
    return f"transformer.resblocks.{found[0]}.{_OPEN_CLIP[found[1]]}" if found and found[1] in _OPEN_CLIP else None


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    found = re.fullmatch(pattern, name)
    return found.groups() if found else None
