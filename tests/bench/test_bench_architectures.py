"""The UNets that are measured are the real ones."""

import pytest
from torch import nn

from sd_atoms.bench.architectures import conv3x3_calls
from sd_atoms.bench.methods import attach
from sd_atoms.pipeline.architectures import SD_V1_4, build_unet, unet_config
from sd_atoms.tuner import AtomsConfig, named_targets


@pytest.fixture(scope="module")
def sd_unet():
    return build_unet(SD_V1_4, "meta")


def test_sd_architecture_has_the_published_size(sd_unet):
    assert sum(parameter.numel() for parameter in sd_unet.parameters()) == 859_520_964
    assert len(named_targets(sd_unet, "conv3x3")) == 52
    assert len(named_targets(sd_unet, "conv")) == 98
    assert sum(type(module) is nn.Linear for module in sd_unet.modules()) == 184


@pytest.mark.parametrize(("m", "numbers"), [(9, 4_212), (6, 2_808)])
def test_atoms_of_the_sd_architecture(m, numbers):
    unet = build_unet(SD_V1_4, "meta")
    # in inference mode nothing is decomposed, so that weights without values will do
    unet.add_adapter(AtomsConfig(m=m, target_modules="conv3x3", inference_mode=True))
    changes = [parameter for name, parameter in unet.named_parameters() if ".atoms_delta." in name]
    assert sum(change.numel() for change in changes) == numbers


def test_more_atoms_than_taps_are_refused(sd_unet):
    with pytest.raises(ValueError, match="9 taps, fewer than m=12"):
        sd_unet.add_adapter(AtomsConfig(m=12, target_modules="conv3x3", inference_mode=True))


@pytest.mark.parametrize(("method", "numbers"), [("lora", 797_184), ("loha", 4_377_920)])
def test_baselines_of_the_sd_architecture(method, numbers):
    assert sum(parameter.numel() for parameter in attach(build_unet(SD_V1_4, "meta"), method)) == numbers


def test_conv_calls_of_the_sd_architecture():
    calls = conv3x3_calls(SD_V1_4, batch_size=1, resolution_px=512)
    assert sum(call.count for call in calls) == 52
    assert sum(call.count * call.in_channels * call.out_channels for call in calls) * 9 == 541_002_240
    assert calls[0][:3] == (4, 320, (64, 64))
    halving = [call for call in calls if call.geometry.stride == (2, 2)]
    assert [call.output_size for call in halving] == [(32, 32), (16, 16), (8, 8)]


def test_pocket_is_a_unet_of_its_own():
    config = unet_config("pocket")
    assert sum(parameter.numel() for parameter in build_unet(config, "meta").parameters()) < 20e6
