"""What several tests share."""

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


def train_config(**settings) -> TrainConfig:
    """The settings of a run, in whatever section they are."""
    return build(TrainConfig, settings)
