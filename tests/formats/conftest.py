"""Opening the tiny base is a copy of one that is open, since these tests open it some hundred times."""

import copy
import importlib

import pytest
from helpers import tiny_base

from sd_atoms.pipeline.base import open_base

USERS = (
    "adapters", "test_export", "test_extract", "test_fuzz_files", "test_imported", "test_inspect_files",
    "sd_atoms.commands.export", "sd_atoms.commands.extract", "sd_atoms.commands.import", "sd_atoms.pipeline.gather",
)  # fmt: skip
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@pytest.fixture(scope="package", autouse=True)
def quick_base():
    base = open_base(tiny_base())

    def opened(name, **settings):
        if name != tiny_base():
            return open_base(name, **settings)
        own = copy.copy(base)
        for part in PARTS:
            own.register_modules(**{part: copy.deepcopy(getattr(base, part))})
        return own

    with pytest.MonkeyPatch.context() as patch:
        for module in map(importlib.import_module, USERS):
            if hasattr(module, "open_base"):
                patch.setattr(module, "open_base", opened)
        yield
