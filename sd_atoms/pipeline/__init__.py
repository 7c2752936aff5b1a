"""Opening a base pipeline, and moving adapters between it and the disk."""

from sd_atoms.pipeline.adapters import load_adapter, load_atoms, save_adapter, save_atoms
from sd_atoms.pipeline.artefact import Artefact
from sd_atoms.pipeline.artefact_files import read_artefact
from sd_atoms.pipeline.base import DTYPES, open_base
from sd_atoms.pipeline.tokens import add_placeholder_tokens, placeholder_rows

__all__ = [
    "DTYPES",
    "Artefact",
    "add_placeholder_tokens",
    "load_adapter",
    "load_atoms",
    "open_base",
    "placeholder_rows",
    "read_artefact",
    "save_adapter",
    "save_atoms",
]
