"""What a training makes: the adapter's header, and the adapter of a checkpoint, so that people can pick the step."""

import tempfile
from dataclasses import replace
from pathlib import Path

from sd_atoms.errors import UserError
from sd_atoms.pipeline import read_artefact, save_adapter
from sd_atoms.pipeline.artefact import Artefact
from sd_atoms.pipeline.header import Header
from sd_atoms.settings import read_yaml, replaced, resolve
from sd_atoms.training.base import open_base_of
from sd_atoms.training.checkpoint import NAME, checkpoints, kept_values
from sd_atoms.training.config import TrainConfig
from sd_atoms.training.diffusion import add_adapters, trained_parts
from sd_atoms.training.optimiser import load_values
from sd_atoms.training.run_folder import CONFIG


def header(config: TrainConfig, **training) -> Header:
    """What the adapter's file says of its making; `training`: how it went."""
    return Header(
        method=config.method.chosen().name,
        base=config.base.pretrained_model_name_or_path,
        tokens={
            token: word
            for concept in config.all_concepts
            for token, word in zip(concept.tokens, concept.initializers, strict=True)
        },
        instance_prompt=config.all_concepts[0].instance_prompt,
        sampling=replace(config.images.sampling, resolution=config.data.resolution),
        training=training | {"learning_rate": config.optimiser.learning_rate, "seed": config.loop.seed},
    )


def checkpoint_of(source: str) -> Path | None:
    """The checkpoint that a source stands for: itself, or the last one of a folder of them; None where it is none."""
    path = Path(source).expanduser()
    if path.is_dir() and checkpoints(path):
        path = checkpoints(path)[-1]
    return path if path.is_file() and NAME.fullmatch(path.name) else None


def run_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint.

    Raises:
        UserError: there is none above it.
    """
    for folder in checkpoint.resolve().parents[:3]:
        if (folder / CONFIG).is_file():
            return folder
    raise UserError(
        f"{checkpoint}: a checkpoint is read with the {CONFIG} of its run, which is not in a folder above it"
    )


def run_config(folder: Path, base: str | None = None, base_config: str | None = None) -> TrainConfig:
    """The settings of a run.

    Args:
        folder: of the run.
        base: where its base is now; None = where it was.
        base_config: configs of the base, where it is one file; None = as the run had them.

    Raises:
        UserError: it is no run folder, is a classifier's, or its settings cannot be read.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: is no run folder, it holds no {CONFIG}")
    if "model" in read_yaml(folder / CONFIG):
        raise UserError(f"{folder}: is the run of a classifier, of which `sd-atoms classify` reads the file in it")
    config = resolve(TrainConfig, {}, str(folder / CONFIG), [])
    if base is None:
        return config if base_config is None else replaced(config, base_config=base_config)
    made_like = (base_config or config.base.base_config) if Path(base).expanduser().is_file() else None
    return replaced(config, pretrained_model_name_or_path=base, revision=None, base_config=made_like)


def open_adapter(
    source: str, base: str | None = None, base_config: str | None = None, of_step: bool = False
) -> Artefact:
    """Reads an adapter as `read_artefact` does, or that of a checkpoint.

    Args:
        source: what `read_artefact` takes, a checkpoint inside its run folder, or the folder of checkpoints for the
            last one.
        base: where the run's base is now; None = where it was.
        base_config: its configs, where it is one file; None = as the run had them.
        of_step: of a checkpoint as `kept_values`.

    Raises:
        UserError: there is none, it is corrupt, or the checkpoint's run cannot be told.
    """
    path = checkpoint_of(source)
    if path is None:
        return read_artefact(source)
    config = run_config(run_of(path), base, base_config)
    pipe = open_base_of(config.base)
    add_adapters(pipe, config)
    rows, _, parameters = trained_parts(pipe, config)
    step, values = kept_values(path, parameters, of_step)
    load_values(parameters, values)
    tokens = config.tokens
    if rows is not None:
        pipe.text_encoder.set_input_embeddings(rows.write_back())
        tokens = dict(zip(config.tokens, rows.rows.detach(), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        save_adapter(pipe, file, tokens=tokens, about=header(config, steps=step).entries())
        return replace(read_artefact(file), source=source)
