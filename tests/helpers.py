"""What several tests share."""

import functools
import tempfile

from tiny import write_tiny_base

from sd_atoms.settings import build
from sd_atoms.training.config import TrainConfig

# the least that a run on the packaged concept says; tests add what makes it small
CASTLE = dict(
    pretrained_model_name_or_path="pocket",
    instance_data_dir="pocket:castle",
    instance_prompt="photo of a <castle>.",
    placeholder_token="<castle>",
    initializer_token="castle",
)


@functools.cache
def _tiny_folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="tiny-base-")  # is removed when the process ends
    write_tiny_base(folder.name)
    return folder


def tiny_base() -> str:
    """The folder of a base of 80,000 numbers, for what every base does alike: a run of it takes a second."""
    return _tiny_folder().name


def train_config(**settings) -> TrainConfig:
    """The settings of a run, in whatever section they are."""
    return build(TrainConfig, settings)
