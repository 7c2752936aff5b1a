"""Finds the nearest filter atoms of an adapter of any kind, or of a whole fine-tuned model, and says how near.

A LoRA of 100 MB may be a few kilobytes of atoms, or it may not: what atoms explain of the change, layer by layer, and
what of it lies in layers without atoms, is told, and too little is refused.
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sd_atoms.errors import UserError
from sd_atoms.files import check_outputs
from sd_atoms.generation import Request, generate, save_image
from sd_atoms.methods.adapters import adapters_off
from sd_atoms.pipeline import DTYPES, load_adapter, open_base, save_adapter
from sd_atoms.pipeline.artefact import Artefact
from sd_atoms.pipeline.base import is_model
from sd_atoms.pipeline.extraction import Extraction, extract, model_changes
from sd_atoms.pipeline.gather import gather
from sd_atoms.pipeline.header import Header, find_base, find_base_config, parse_header
from sd_atoms.pipeline.sampling import Sampling
from sd_atoms.report.grid import image_grid
from sd_atoms.report.table import text_table
from sd_atoms.settings import setting
from sd_atoms.sources import public_name
from sd_atoms.training.adapter import open_adapter
from sd_atoms.tuner import AtomsLayer

WHAT, ATOMS, RESULT = "what to extract from", "atoms", "result"
SHOWN = 12
WITHOUT_ATOMS = {"text encoder", "norm layers", "biases"}
SEEDS = (0, 1)


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms extract`."""

    source: str = setting(
        None,
        WHAT,
        "an adapter of any program, or a fine-tuned model as a folder or one file",
        required=True,
        positional=True,
    )
    pretrained_model_name_or_path: str | None = setting(
        None, WHAT, "the base; none = the one the adapter was trained on", aliases=["base"]
    )
    base_config: str | None = setting(
        None, WHAT, "of a base or model in one file: a folder or hub id with its configs"
    )

    m: int = setting(9, ATOMS, "atoms per layer", low=0)
    m1: int = setting(0, ATOMS, "overcomplete atoms mixed per input channel; 0 = one for all", low=0)
    kc: int = setting(
        0, ATOMS, "block atoms over kc×kc channels of 1×1 and Linear layers, for target=conv+linear; 0 = none", low=0
    )
    target: str = setting("conv3x3", ATOMS, "which layers: a named set or an expression over module names")

    floor: float = setting(
        0.5, RESULT, "refuse atoms that explain less than this share of the change", low=0.0, high=1.0
    )
    force: bool = setting(False, RESULT, "write them even so")
    out: str = setting(None, RESULT, "the .safetensors file to write", required=True)
    prompt: str | None = setting(
        None,
        RESULT,
        "draw it by the base, the source and the atoms; none = the adapter's instance prompt, if it has one",
    )
    dtype: str = setting("fp32", RESULT, "of the numbers written", choices=tuple(DTYPES))
    overwrite: bool = setting(False, RESULT, "replace that file where it exists")


def run(settings: Settings) -> Path:
    """Writes the atoms, their pictures beside them, and prints what they explain; returns the file.

    Raises:
        UserError: something in the settings is wrong, source or base cannot be used, the atoms explain less than the
            floor, or the file cannot be written.
    """
    out, source = Path(settings.out), settings.source
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the name of a .safetensors file is needed")
    picture = out.with_suffix(".png")
    for written in (out, picture):
        check_outputs(settings.overwrite, out=str(written))
    base = settings.pretrained_model_name_or_path
    if is_model(source):
        if base is None:
            raise UserError(
                f"pretrained_model_name_or_path (--base) is required: {source} does not say what it was made from"
            )
        artefact, header, base_config = None, Header(), settings.base_config
        pipe, other = (_open(name, base_config) for name in (base, source))
        try:
            layers = model_changes(pipe, other)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
    else:
        artefact = open_adapter(source, base, settings.base_config)
        header = parse_header(source, artefact.about)
        base = find_base(base, source, header)
        base_config = find_base_config(settings.base_config, source, base)
        layers = gather([artefact], [1.0], base, base_config, other_base=True).layers
        pipe, other = open_base(base, base_config=base_config), None
    if not layers:
        raise UserError(f"{source}: changes nothing of {base}")
    chosen = {key: value for key in ("m", "m1", "kc") if (value := getattr(settings, key)) or key == "m"}
    found = extract(pipe, layers, chosen, settings.target, "extracted")
    print(extraction_text(found))
    if not found.layers or (found.explained < settings.floor and not settings.force):
        told = f"{source}: atoms explain {found.explained:.1%} of its change"
        told += (
            f", less than --floor {settings.floor:g}" if found.layers else f", which is outside of {settings.target}"
        )
        blocks = any(layer.atoms_block_delta for layer in pipe.unet.modules() if isinstance(layer, AtomsLayer))
        hints = [] if blocks else ["--target conv+linear --kc 4 covers attention and 1×1 convolutions too"]
        hints += ["other --target, --kc or --m1 may take more of it"]
        if not found.layers and found.outside.keys() <= WITHOUT_ATOMS:
            hints = ["only convolutions and Linear layers of the UNet can have atoms here"]
        hints += ["--force writes it all the same"] if found.layers else []
        raise UserError("; ".join([told, *hints]))
    tokens = {} if artefact is None else artefact.tokens
    about = Header(
        base=base, tokens=header.tokens, instance_prompt=header.instance_prompt, sampling=header.sampling
    ).entries()
    about |= {"base": public_name(base), "extracted_from": public_name(source), "explained": found.explained}
    save_adapter(pipe, out, "extracted", tokens=tokens, dtype=settings.dtype, about=about)
    print(f"Written to {out}")
    prompt = settings.prompt or header.instance_prompt
    if prompt:
        if other is None:
            other = open_base(base, base_config=base_config)
        save_image(picture, _before_and_after(pipe, other, artefact, out, prompt, header.sampling), {"prompt": prompt})
        print(f"{picture}: {prompt!r} by the base, the source and the atoms")
    return out


def _open(name: str, base_config: str | None):
    return open_base(name, base_config=base_config if Path(name).expanduser().is_file() else None)


def _before_and_after(
    pipe, other, artefact: Artefact | None, out: Path, prompt: str, sampling: Sampling
) -> Image.Image:
    """Two pictures each by the base, by what was extracted from, and by the atoms."""
    requests = [Request(prompt, seed, "") for seed in SEEDS]
    if artefact is not None:
        load_adapter(other, artefact)
    load_adapter(pipe, out, "written")  # with its words
    before = [image for _, image in generate(other, requests, sampling)]
    after = [image for _, image in generate(pipe, requests, sampling)]
    with adapters_off(pipe.unet, pipe.text_encoder):
        plain = [image for _, image in generate(pipe, requests, sampling)]
    return image_grid([plain, before, after], ["base", "source", "atoms"], [f"seed {seed}" for seed in SEEDS])


def extraction_text(found: Extraction) -> str:
    """The strongest layers with their shares, and what lies outside of them."""
    layers = sorted(found.layers.items(), key=lambda item: -item[1][0])
    rows = [[name, f"{share:.2%}", f"{explained:.1%}"] for name, (share, explained) in layers[:SHOWN]]
    more = [f"… and {len(layers) - SHOWN} layers with less"] if len(layers) > SHOWN else []
    covered = sum(share for share, _ in found.layers.values())
    table = [text_table(["layer", "of all the change", "explained by atoms"], rows), *more, ""]
    lines = table if rows else []
    lines += [f"in layers with atoms: {covered:.1%} of the change"]
    lines += [f"outside of them: {share:.1%} in {kind}" for kind, share in sorted(found.outside.items())]
    return "\n".join([*lines, f"explained in all: {found.explained:.1%}"])
