"""Lists what is wrong or odd about a training run; starts none."""

from sd_atoms.doctor import doctor
from sd_atoms.training.config import TrainConfig

Settings = TrainConfig
run = doctor
