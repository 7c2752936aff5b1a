"""The keys of adapter files: kohya's, LyCORIS', ComfyUI's and diffusers' to modules and parts, and back.

Written here as `<module>.<part>`, the module by diffusers' or transformers' name, the part by LyCORIS' (lora_up,
hada_w1_a, diff, …, see `sd_atoms.methods.imported`):

    lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight          kohya, LyCORIS
    lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight           the same by LDM's name, of SD v1 and v2
    diffusion_model.input_blocks.1.0.in_layers.2.diff               ComfyUI
    unet.down_blocks.0.resnets.0.conv1.lora_B.weight                diffusers; older: .lora.up.weight,
                                                                    .processor.to_q_lora.up.weight
    lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight      text encoder; diffusers: text_encoder.text_model.…
    bundle_emb.castle.string_to_param.*                             a word that comes with the file
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from sd_atoms.formats.names import demangled, mangled, unet_from_ldm

UNET, TEXT, WORD = "unet", "text_encoder", "word"
ATOMS_B, ATOMS_BLOCK_B = ".atoms_b", ".atoms_block_b"  # the ends of keys that our node for ComfyUI reads
# the ends of keys; several write the same part, and those of diffusers mean the same as kohya's
_ENDS = {
    "lora_up.weight": "lora_up",
    "lora_down.weight": "lora_down",
    "lora_mid.weight": "lora_mid",
    "lora_B.weight": "lora_up",
    "lora_A.weight": "lora_down",
    "lora.up.weight": "lora_up",
    "lora.down.weight": "lora_down",
    "lora_linear_layer.up.weight": "lora_up",
    "lora_linear_layer.down.weight": "lora_down",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    **{
        part: part
        for part in (
            "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a",
            "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "diff", "diff_b", "w_norm", "b_norm",
        )
    },
}  # fmt: skip
_WRITTEN = {"lora_up": "lora_up.weight", "lora_down": "lora_down.weight", "lora_mid": "lora_mid.weight"}
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))_lora\.(up|down)\.weight")
_ROWS = re.compile(r"bundle_emb\.(.+)\.(?:string_to_param\.\*|emb_params)")
# before a mangled name
_MANGLED_PREFIXES = {"lora_unet_": UNET, "lora_te_": TEXT, "lora_te1_": TEXT, "lycoris_": UNET}
_PLAIN_PREFIXES = {"unet.": UNET, "text_encoder.": TEXT, "diffusion_model.": UNET}
# what the name of a module of such a UNet begins with
_ROOTS = (
    "conv_in", "conv_out", "conv_norm_out", "time_embedding", "down_blocks", "mid_block", "up_blocks",
)  # fmt: skip
_SDXL = ("lora_te2_", "text_encoder_2.")


class Entry(NamedTuple):
    """What a key is about: place (UNET, TEXT or WORD), the module's name there or the word, the part of it."""

    place: str
    module: str
    part: str


def parse_key(key: str) -> Entry | None:
    """What a key is about; None for one that no known program would write for Stable Diffusion v1 or v2."""
    word = _ROWS.fullmatch(key)
    if word:
        return Entry(WORD, word[1], "rows")
    old = _PROCESSOR.fullmatch(key)
    if old:
        key = f"{old[1]}.{old[2]}{'.0' if old[2] == 'to_out' else ''}.lora.{old[3]}.weight"
    end = _end(key)
    if end is None:
        return None
    name = key[: -len(end) - 1]
    for prefix, place in _MANGLED_PREFIXES.items():
        if name.startswith(prefix):
            return _entry(place, demangled(name[len(prefix) :]), _ENDS[end])
    for prefix, place in _PLAIN_PREFIXES.items():
        if name.startswith(prefix):
            return _entry(place, name[len(prefix) :], _ENDS[end])
    # as diffusers' save_attn_procs wrote them; those of PEFT say their alpha elsewhere
    return _entry(UNET, name, _ENDS[end]) if end.startswith(("lora.", "lora_linear_layer.")) else None


_BY_LENGTH = sorted(_ENDS, key=len, reverse=True)


def layer_name(key: str) -> str:
    """A key without its part: how the file itself calls the layer."""
    return key[: -len(end) - 1] if (end := _end(key)) else key


def _end(key: str) -> str | None:
    return next((end for end in _BY_LENGTH if key.endswith(f".{end}")), None)


def _entry(place: str, module: str | None, part: str) -> Entry | None:
    if module is None:
        return None
    if place == TEXT:
        return Entry(TEXT, module.removeprefix("text_model."), part)
    if module.split(".")[0] in ("input_blocks", "middle_block", "output_blocks", "time_embed", "out"):
        module = unet_from_ldm(module)
    if module is None or module.split(".")[0] not in _ROOTS:
        return None
    return Entry(UNET, module, part)


def parse_keys(keys: Iterable[str]) -> tuple[dict[str, Entry], list[str]]:
    """key -> what it is about, and the keys about nothing known."""
    parsed = {key: parse_key(key) for key in keys}
    entries = {key: entry for key, entry in parsed.items() if entry is not None}
    return entries, [key for key, entry in parsed.items() if entry is None]


def is_sdxl(keys: Iterable[str]) -> bool:
    """Whether keys are of Stable Diffusion XL, by its second text encoder or its ten transformer blocks in a row."""
    deep = re.compile(
        r"(attentions|blocks[._]\d+|middle_block)[._]\d+[._]transformer_blocks[._][1-9]|lora_unet_label_emb|"
        r"conditioner\.embedders"
    )
    return any(key.startswith(_SDXL) or deep.search(key) for key in keys)


def kohya_module(place: str, module: str) -> str:
    """What kohya puts before the part: lora_unet_down_blocks_0_resnets_0_conv1."""
    return f"lora_unet_{mangled(module)}" if place == UNET else f"lora_te_text_model_{mangled(module)}"


def kohya_key(place: str, module: str, part: str) -> str:
    """The whole key, as kohya and LyCORIS write it."""
    return f"{kohya_module(place, module)}.{_WRITTEN.get(part, part)}"
