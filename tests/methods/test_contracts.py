"""The table: every method and every promise of `sd_atoms.methods.contract`, on two networks."""

import json

import pytest

from sd_atoms.methods import all_methods, from_peft_config
from sd_atoms.methods.contract import CHECKS, Case

ADAPTERS = sorted(name for name in all_methods() if name != "token")
ON_CONVOLUTIONS = {
    "atoms, overcomplete": dict(target="conv3x3", settings=dict(m=4, m1=2)),
    "atoms, blocks": dict(target="conv", settings=dict(m=0, kc=2, block_layers="all")),
    "lora-conv": dict(target="conv3x3", settings=dict(rank=2, alpha=3)),
    "lycoris-locon": dict(target="conv+linear", settings=dict(rank=2, alpha=1)),
    "lycoris-loha": dict(target="conv+linear", settings=dict(rank=2)),
    "lycoris-lokr": dict(target="conv+linear", settings=dict(rank=1, factor=2, alpha=0.5)),
    "bitfit": {},
    "norm": {},
    "full": {},
}
OF_PEFT = {
    "IA3": dict(target_modules=["to_k", "to_v", "net.2"], feedforward_modules=["net.2"]),
    "FOURIERFT": dict(target_modules=["to_q", "to_v"], n_frequency=9, scaling=30.0, init_weights=True),
    "WAVEFT": dict(target_modules=["to_q", "to_v"], n_frequency=9),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_method_on_a_unet(name, check, unet, small_unet_inputs):
    settings = {"block_size": 4} if name == "oft" else {}
    CHECKS[check](Case(all_methods()[name], unet, small_unet_inputs, settings))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ON_CONVOLUTIONS)
def test_our_tuners_on_every_kind_of_layer(name, check, convnet, convnet_inputs):
    method = all_methods()[name.partition(",")[0]]
    CHECKS[check](Case(method, convnet, convnet_inputs, **ON_CONVOLUTIONS[name]))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", OF_PEFT)
def test_other_tuners_of_peft_by_their_config(kind, check, unet, small_unet_inputs, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **OF_PEFT[kind]}))
    CHECKS[check](Case(from_peft_config(tmp_path), unet, small_unet_inputs))
