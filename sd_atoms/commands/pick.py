"""Writes a step of a run as an adapter file, at a strength that is folded into it."""

from dataclasses import dataclass, replace
from pathlib import Path

from sd_atoms.errors import UserError
from sd_atoms.files import check_outputs
from sd_atoms.pipeline import DTYPES
from sd_atoms.pipeline.artefact_files import write_artefact
from sd_atoms.pipeline.strength import folded
from sd_atoms.settings import replaced, setting
from sd_atoms.training.adapter import open_adapter, run_config
from sd_atoms.training.base import open_base_of
from sd_atoms.training.checkpoint import checkpoints_by_step
from sd_atoms.training.run_folder import CHECKPOINTS, PICKED, run_name

WHAT, RESULT = "what is written", "result"


@dataclass(frozen=True)
class Settings:
    """Settings of `sd-atoms pick`."""

    run: str = setting(None, WHAT, "run folder", required=True, positional=True)
    step: int = setting(None, WHAT, "of the checkpoint", required=True, low=1)
    strength: float = setting(1.0, WHAT, "strength of the run's adapter that becomes strength 1", low=-10.0, high=10.0)
    pretrained_model_name_or_path: str | None = setting(
        None, WHAT, "where the run's base is now; none = where it was", aliases=["base"]
    )
    base_config: str | None = setting(
        None, WHAT, "of a base in one file: a folder or hub id with its configs; none = as the run had them"
    )
    dtype: str = setting("fp32", RESULT, "of the numbers", choices=tuple(DTYPES))
    out: str | None = setting(None, RESULT, f"a .safetensors file; none = one in {PICKED}/ of the run, called by both")
    overwrite: bool = setting(False, RESULT, "replace that file where it exists")


def run(settings: Settings) -> Path:
    """Writes the file and returns its path.

    Raises:
        UserError: there is no such checkpoint, the method has no strength that can be folded in, or the file is there.
    """
    if settings.strength == 0:
        raise UserError("strength: at 0 an adapter does nothing; -10 to 10 is allowed, 0 is not")
    folder, base = Path(settings.run), (settings.pretrained_model_name_or_path, settings.base_config)
    config, kept = run_config(folder, *base), checkpoints_by_step(folder / CHECKPOINTS)
    if settings.step not in kept:
        raise UserError(f"step: there is no checkpoint of step {settings.step}; there are {', '.join(map(str, kept))}")
    name = f"{run_name(replaced(config, output_dir=str(folder)))}-step-{settings.step}-strength-{settings.strength:g}"
    out = Path(settings.out) if settings.out else folder / PICKED / f"{name}.safetensors"
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the name of a .safetensors file is needed")
    check_outputs(settings.overwrite, out=str(out))
    artefact = open_adapter(str(kept[settings.step]), *base, of_step=True)
    if settings.strength != 1:
        artefact = folded(artefact, settings.strength, open_base_of(config.base))
        training = {**artefact.about.get("training", {}), "strength": settings.strength}
        artefact = replace(artefact, about={**artefact.about, "training": training})
    write_artefact(artefact, out, DTYPES[settings.dtype])
    print(f"{out}: step {settings.step}, strength {settings.strength:g} folded in; load it at strength 1")
    return out
