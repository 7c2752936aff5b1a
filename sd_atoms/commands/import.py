"""Turns a file of kohya, LyCORIS, ComfyUI or diffusers into an adapter of ours, its numbers as they are.

`--adapter` of every command takes such a file as it is, too; this one says what fits a base and what does not.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sd_atoms.errors import UserError
from sd_atoms.files import check_outputs
from sd_atoms.methods.imported import ImportedConfig, dora_axis, kind_of
from sd_atoms.pipeline import DTYPES, load_adapter, open_base, read_artefact, save_adapter
from sd_atoms.pipeline.artefact_files import is_ours
from sd_atoms.settings import setting
from sd_atoms.sources import public_name
from sd_atoms.tuner import AtomsConfig

WHAT, RESULT = "what to import", "result"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms import`."""

    file: str = setting(
        None, WHAT, "a .safetensors file of another program, or a folder of diffusers", required=True, positional=True
    )
    pretrained_model_name_or_path: str = setting(
        None, WHAT, "the base that it is for", required=True, aliases=["base"]
    )
    base_config: str | None = setting(None, WHAT, "of a base in one file: a folder or hub id with its configs")
    out: str | None = setting(None, RESULT, "the file or folder to write; none = NAME-imported.safetensors beside it")
    dtype: str = setting("fp32", RESULT, "of the numbers written", choices=tuple(DTYPES))
    overwrite: bool = setting(False, RESULT, "replace what is there")


def run(settings: Settings) -> Path:
    """Reads the file, says what it holds, and writes it; returns the path.

    Raises:
        UserError: the file cannot be read or is no adapter of another program, nothing of it fits the base, or the
            place cannot be written to.
    """
    source = Path(settings.file).expanduser()
    name = source.name if source.is_dir() else source.stem
    out = source.with_name(f"{name}-imported.safetensors") if settings.out is None else Path(settings.out)
    if out.suffix == ".safetensors":
        check_outputs(settings.overwrite, out=str(out))
    elif out.exists() and not settings.overwrite:
        raise UserError(f"--out {out}: exists; pass --overwrite to replace it, or another name")
    artefact = read_artefact(source)
    ours = source.is_file() and is_ours(source)
    if artefact.config is not None and not isinstance(artefact.config, ImportedConfig) and (ours or source.is_dir()):
        raise UserError(f"{source}: it is an adapter of {artefact.method} already, which every command takes")
    base = settings.pretrained_model_name_or_path
    pipe = open_base(base, base_config=settings.base_config)
    loaded = load_adapter(pipe, artefact, "imported")
    about = loaded.about | {"base": public_name(base)}
    save_adapter(pipe, out, "imported", tokens=list(loaded.tokens), dtype=settings.dtype, about=about)
    for place, model, config in (
        ("UNet", pipe.unet, loaded.config),
        ("text encoder", pipe.text_encoder, loaded.text_config),
    ):
        if config is not None:
            print(f"{place}: {_kinds(model, config)}")
    if loaded.tokens:
        print(f"words: {' '.join(loaded.tokens)}")
    print(f"Written to {out}")
    return out


def _kinds(model, config: ImportedConfig | AtomsConfig) -> str:
    """How many layers there are of each kind, and which way DoRA norms."""
    if isinstance(config, AtomsConfig):
        return f"{len(config.target_modules)} layers of filter atoms"
    kinds = Counter()
    for name, parts in config.parts.items():
        kind = kind_of(parts) or "bias"
        if "dora_scale" in parts:
            layer = model.get_submodule(name)
            held = layer.imported_dora_scale["imported"]
            kind += " with DoRA by " + ("outputs", "inputs")[dora_axis(held, layer.get_base_layer().weight.shape)]
        kinds[kind] += 1
    return ", ".join(f"{count} layers of {kind}" for kind, count in kinds.items())
