"""Personalise Stable Diffusion by training only filter atoms. Importing this package makes PEFT know our tuners."""

from typing import TYPE_CHECKING

import sd_atoms.methods  # noqa: F401
from sd_atoms.errors import UserError
from sd_atoms.tuner import AtomsConfig, add_weighted_adapter

if TYPE_CHECKING:
    from sd_atoms.pipeline import load_adapter, load_atoms, save_adapter, save_atoms

__version__ = "0.1.0"
_IN_PIPELINE = ("load_adapter", "load_atoms", "save_adapter", "save_atoms")
__all__ = [
    "AtomsConfig",
    "UserError",
    "add_weighted_adapter",
    "load_adapter",
    "load_atoms",
    "save_adapter",
    "save_atoms",
]


def __getattr__(name: str):
    if name in _IN_PIPELINE:  # diffusers is imported by those who need a pipeline
        from sd_atoms import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
