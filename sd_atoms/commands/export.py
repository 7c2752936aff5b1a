"""Writes an adapter for other programs: as LoRA, differences of weights, a merged model, for ComfyUI, as words.

Without --to it prints what each kind is, how large, how exact and for which programs. Several adapters, with commas
between them, become one file.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from sd_atoms.errors import UserError
from sd_atoms.files import replacing, safe_name
from sd_atoms.formats.keys import UNET, kohya_key
from sd_atoms.pipeline import DTYPES, open_base
from sd_atoms.pipeline.checkpoint import merge_into, write_checkpoint
from sd_atoms.pipeline.comfy import NODE, why_not, write_comfy
from sd_atoms.pipeline.export import ReadBack, file_bytes, tensors_bytes, write_lora, write_tensors
from sd_atoms.pipeline.gather import Contents, gather, refusal
from sd_atoms.pipeline.header import find_base, find_base_config, parse_header
from sd_atoms.report.table import text_table
from sd_atoms.settings import setting
from sd_atoms.training.adapter import open_adapter

WHAT, HOW = "what to export", "how to write it"
KINDS = ("comfy", "checkpoint", "lora", "diff", "words")
PROGRAMS = "ComfyUI, A1111, Forge, InvokeAI, stable-diffusion.cpp"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms export`."""

    adapter: str = setting(
        None,
        WHAT,
        "a run, an adapter's folder or .safetensors file, of any program, a checkpoint or a hub id; several with "
        "commas between them",
        required=True,
        positional=True,
    )
    pretrained_model_name_or_path: str | None = setting(
        None, WHAT, "the base; none = the one it was trained on", aliases=["base"]
    )
    base_config: str | None = setting(
        None, WHAT, "of a base in one file: a folder or hub id with its configs; none = as the adapter's run says"
    )
    other_base: bool = setting(False, WHAT, "allow a base other than the adapter's own")
    strength: str = setting("1", WHAT, "of the adapter; for several, one number for all or one each: 0.7,0.5")

    to: str | None = setting(None, HOW, f"kinds, with commas between them: {', '.join(KINDS)}; none = tell about them")
    dtype: str = setting("fp16", HOW, "of the numbers written", choices=tuple(DTYPES))
    lossy_rank: int | None = setting(None, HOW, "of lora: the nearest LoRA of this rank; none = exact", low=1)
    name: str | None = setting(None, HOW, "name of the files; none = that of the run or file")
    out: str | None = setting(None, HOW, "folder for them; none = `export` in the run or beside the file")
    overwrite: bool = setting(False, HOW, "replace files that are there")


def run(settings: Settings) -> None:
    """Writes the files and says how exact they are, or prints the table of kinds.

    Raises:
        UserError: something in the settings is wrong, the adapter has no such form, its base is another one, or a
            file is there or cannot be written.
    """
    sources, strengths = _sources(settings)
    kinds = [] if settings.to is None else [kind.strip() for kind in settings.to.split(",")]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f"--to {settings.to}: {unknown[0]!r} is not one of {', '.join(KINDS)}")
    if settings.lossy_rank is not None and "lora" not in kinds:
        raise UserError("--lossy_rank is only for --to lora")
    given = settings.name or "+".join(_name(source) for source in sources)
    name = safe_name(given)
    if kinds and name != given:
        print(f"the files are called {name}, since {given!r} has what names of files should not have")
    place = Path(sources[0]).expanduser()
    out = Path(settings.out) if settings.out else (place if place.is_dir() else place.parent) / "export"
    paths = {kind: [out / file for file in _files(kind, name)] for kind in kinds}
    _refuse_existing([path for own in paths.values() for path in own], settings.overwrite)
    artefacts = [
        open_adapter(source, settings.pretrained_model_name_or_path, settings.base_config) for source in sources
    ]
    _refuse_twice(sources, [artefact.digest() for artefact in artefacts])
    if "comfy" in kinds and (reason := why_not([artefact.config for artefact in artefacts])):
        raise UserError(f"--to comfy: {reason}")
    base = find_base(settings.pretrained_model_name_or_path, sources[0], parse_header(sources[0], artefacts[0].about))
    base_config = find_base_config(settings.base_config, sources[0], base)
    contents = gather(artefacts, strengths, base, base_config, settings.other_base)
    refused = {kind: reason for kind in KINDS if (reason := refusal(kind, artefacts, contents))}
    for kind in kinds:
        if kind in refused:
            raise UserError(f"--to {kind}: {refused[kind]}")
    if "words" in kinds:
        own = {token: _word_path(out, token) for token in _words(contents.tokens)}
        if len({str(path).lower() for path in own.values()}) < len(own):
            raise UserError(f"{' '.join(own)}: two of these words would get one file; export them from two adapters")
        _refuse_existing(list(own.values()), settings.overwrite)
    header = {"ss_network_module": "networks.lora", "ss_output_name": name}
    header |= {"ss_base_model_version": contents.sd} if contents.sd else {}
    if len(artefacts) == 1 and not settings.other_base:
        header |= {"sd_atoms_base_fingerprint": artefacts[0].about.get("fingerprint", "")}
    if not kinds:
        print(_overview(contents, refused, settings.dtype, header))
        return
    dtype, told = DTYPES[settings.dtype], []
    for kind in kinds:
        if kind in ("lora", "diff"):
            (path,) = paths[kind]
            rank = settings.lossy_rank if kind == "lora" else None
            size = file_bytes(contents.layers, kind, dtype, contents.modules, header, rank)
            print(f"{path}: {_size(size)} …", flush=True)
            found = write_lora(path, contents.layers, kind, dtype, contents.modules, header, rank)
            told += [_written(path, found, "lossy" if rank else None)]
            if rank:
                told += [f"  {layer}: {error:.1%} of its change lost" for layer, error in found.errors.items()]
                told += [f"  in all: {found.total(contents.layers):.1%} of the change lost"]
        elif kind == "comfy":
            path, node = paths[kind]
            told += [_written(path, write_comfy(path, contents.mixed, contents.weights, contents.layers, header))]
            with replacing(node) as temporary:
                shutil.copyfile(NODE, temporary)
            told += [f"{node}: put it into ComfyUI/custom_nodes"]
        elif kind == "words":
            told += _write_words(out, contents.tokens)
        else:
            file, folder = paths[kind]
            print(f"{file} and {folder}: {_size(tensors_bytes(contents.checkpoint_shapes, dtype))} each …", flush=True)
            pipe = open_base(base, base_config=base_config)
            vocabulary = merge_into(pipe, contents.layers, contents.tokens)
            found = write_checkpoint(file, folder, pipe, contents.layers, vocabulary, dtype)
            words = f", with {' '.join(contents.tokens)} in the tokenizer" if contents.tokens else ""
            told += [_written(file, found), f"{folder}: the same for diffusers{words}"]
    if contents.tokens and "words" not in kinds:
        other = " (but for the folder)" if "checkpoint" in kinds else ""
        told.append(f"{' '.join(contents.tokens)}: words are in none of these files{other}; --to words writes them")
    print("\n".join(told))


def _sources(settings: Settings) -> tuple[list[str], list[float]]:
    whole = Path(settings.adapter).expanduser().exists()  # a path may have a comma in it
    sources = [settings.adapter] if whole else [source.strip() for source in settings.adapter.split(",")]
    try:
        strengths = [float(word) for word in settings.strength.split(",")]
    except ValueError as error:
        raise UserError(f"--strength {settings.strength}: numbers with commas between them are allowed") from error
    strengths = strengths * len(sources) if len(strengths) == 1 else strengths
    if len(strengths) != len(sources):
        raise UserError(f"--strength {settings.strength}: {len(strengths)} for {len(sources)} adapters; one each")
    if not all(map(math.isfinite, strengths)):
        raise UserError(f"--strength {settings.strength}: finite numbers are allowed")
    return sources, strengths


def _refuse_twice(sources: list[str], digests: list[str]) -> None:
    for number, digest in enumerate(digests):
        first = digests.index(digest)
        if first != number:
            raise UserError(
                f"{sources[number]}: the same adapter as {sources[first]}; name it once, at the sum of its strengths"
            )


def _name(source: str) -> str:
    path = Path(source).expanduser().resolve()
    return path.stem if path.suffix == ".safetensors" else path.name


def _files(kind: str, name: str) -> list[str]:
    return {
        "comfy": [f"{name}-comfy.safetensors", NODE.name],
        "checkpoint": [f"{name}-checkpoint.safetensors", f"{name}-checkpoint"],
        "lora": [f"{name}-lora.safetensors"],
        "diff": [f"{name}-diff.safetensors"],
        "words": [],
    }[kind]


def _overview(contents: Contents, refused: dict[str, str], dtype_name: str, header: dict[str, str]) -> str:
    biases = any("bias" in change.values and not change.norm for change in contents.layers.values())
    rounding, dtype = f"rounded to {dtype_name}", DTYPES[dtype_name]
    whole = tensors_bytes(contents.checkpoint_shapes, dtype)
    words = sum(
        tensors_bytes({"emb_params": (len(rows), len(rows[0]))}, torch.float16)
        for rows in _words(contents.tokens).values()
    )
    about = {
        "comfy": (_comfy_bytes(contents, header), "exact", "ComfyUI, with the node that comes with it"),
        "checkpoint": (2 * whole, f"the sum {rounding}", f"{PROGRAMS}, diffusers"),
        "lora": (None, rounding, f"{PROGRAMS}, diffusers"),
        "diff": (None, rounding, "ComfyUI, stable-diffusion.cpp" if biases else PROGRAMS),
        "words": (words, "rounded to fp16", f"{PROGRAMS}, diffusers"),
    }
    rows = []
    for kind, (size, exact, programs) in about.items():
        if kind in refused:
            rows.append([kind, "-", "-", refused[kind]])
            continue
        size = file_bytes(contents.layers, kind, dtype, contents.modules, header) if size is None else size
        rows.append([kind, _size(size), exact, programs])
    best = next((kind for kind in ("comfy", "checkpoint", "words") if kind not in refused), None)
    more = ",words" if contents.tokens and best != "words" else ""
    also = "; checkpoint where no node can be put in" if best == "comfy" else ""
    lines = [text_table(["--to", "size", "change", "for"], rows), "", f"Recommended: --to {best}{more}{also}"]
    if contents.sd is None:
        lines.append("Its base is not of Stable Diffusion v1 or v2: plain diffusers opens that, others do not.")
    return "\n".join(lines)


def _comfy_bytes(contents: Contents, header: dict[str, str]) -> int:
    shapes = {kohya_key(UNET, name, part): b.shape for (name, part), b in contents.mixed.items()}
    return tensors_bytes(shapes, torch.float32, header) + NODE.stat().st_size


def _refuse_existing(paths: list[Path], overwrite: bool) -> None:
    there = [path for path in paths if path.exists() and not _is_node(path)]
    if there and not overwrite:
        raise UserError(f"{there[0]}: exists; pass --overwrite to replace it, or another --name or --out")


def _is_node(path: Path) -> bool:
    """Whether a file is the node already, which every adapter comes with alike."""
    return path.name == NODE.name and path.is_file() and path.read_bytes() == NODE.read_bytes()


def _words(tokens: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """token -> its rows in their order: <castle>_1, <castle>_2 … are the further ones of <castle>."""
    words: dict[str, dict[int, torch.Tensor]] = {}
    for token, row in tokens.items():  # a file lists them by letters: _1, _10, _11, _2
        first, _, number = token.rpartition("_")
        further = number.isdigit() and first in tokens
        words.setdefault(first if further else token, {})[int(number) if further else 0] = row
    return {token: [rows[number] for number in sorted(rows)] for token, rows in words.items()}


def _word_path(out: Path, token: str) -> Path:
    """Called as no prompt is worded, where A1111 and Forge would replace it, and without < >, where ComfyUI cuts."""
    return out / f"{safe_name(token.strip('<>'))}-atoms.safetensors"


def _write_words(out: Path, tokens: dict[str, torch.Tensor]) -> list[str]:
    """One file a token, in fp16 whatever the others are, since stable-diffusion.cpp copies bytes."""
    told = []
    for token, rows in _words(tokens).items():
        path = _word_path(out, token)
        write_tensors(path, {"emb_params": torch.stack(rows).half()}, {})
        told += [
            f"{path}: {token}. In prompts: ComfyUI embedding:{path.stem}; A1111, Forge, stable-diffusion.cpp "
            f"{path.stem}; InvokeAI <{path.stem}>; diffusers {token}, after load_textual_inversion({str(path)!r}, "
            f"token={token!r})"
        ]
    return told


def _written(path: Path, found: ReadBack, how: str | None = None) -> str:
    layer, error = found.worst
    return (
        f"{path}: {_size(path.stat().st_size)}, {len(found.errors)} layers{f', {how}' if how else ''}; read back, its "
        f"change differs by {error:.2g} of itself at most ({layer})"
    )


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
