"""Setting processes up: launch configurations, and what is refused."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from sd_atoms.errors import UserError
from sd_atoms.machine import GIVEN_CORES, make_accelerator, usable_cores

CONFIGS = sorted(Path("configs/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_every_launch_configuration(path):
    config = load_config_from_file(str(path))
    several = config.num_processes > 1
    assert config.distributed_type == (DistributedType.MULTI_GPU if several else DistributedType.NO)
    assert config.use_cpu == (path.stem == "cpu")
    assert config.num_machines == (2 if "machines" in path.stem else 1)


def test_there_is_a_launch_configuration_for_each_kind_of_machine():
    assert [path.stem for path in CONFIGS] == ["cpu", "one_gpu", "several_gpus", "several_machines"]


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharding_is_refused_in_one_line(monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(UserError, match=f"distributed_type {kind.value} shards .* MULTI_GPU is allowed"):
        make_accelerator()


def test_a_scheduler_s_share_of_the_cores_holds_where_nothing_is_bound(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert usable_cores() == 8
    monkeypatch.setenv(GIVEN_CORES, "3")
    assert usable_cores() == 3
    monkeypatch.setenv(GIVEN_CORES, "64")  # more than there are
    assert usable_cores() == 8
