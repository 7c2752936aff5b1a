"""Personalise Stable Diffusion by training only filter atoms. Importing this package makes PEFT know our tuners."""

import importlib
from typing import TYPE_CHECKING

import sd_atoms.methods  # noqa: F401
from sd_atoms.errors import UserError
from sd_atoms.tuner import AtomsConfig, add_weighted_adapter

if TYPE_CHECKING:
    from sd_atoms.commands.compare import compare
    from sd_atoms.pipeline import load_adapter, load_atoms, save_adapter, save_atoms

__version__ = "0.1.0"
# what imports diffusers is imported by those who need it
_ELSEWHERE = dict.fromkeys(("load_adapter", "load_atoms", "save_adapter", "save_atoms"), "sd_atoms.pipeline")
_ELSEWHERE |= {"compare": "sd_atoms.commands.compare"}
__all__ = [
    "AtomsConfig",
    "UserError",
    "add_weighted_adapter",
    "compare",
    "load_adapter",
    "load_atoms",
    "save_adapter",
    "save_atoms",
]


def __getattr__(name: str):
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
