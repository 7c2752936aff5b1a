"""The tuner alone, on networks that are not Stable Diffusion's."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from sd_atoms import AtomsConfig

NETWORKS = {  # with random weights
    "ResNet-50": lambda: ResNetForImageClassification(ResNetConfig(num_labels=5)),
    "ConvNeXt-T": lambda: ConvNextForImageClassification(ConvNextConfig(num_labels=5)),
}
SETTINGS = {
    "ResNet-50": dict(m=9, kc=4, target_modules="conv", modules_to_save=["classifier.1"]),
    "ConvNeXt-T": dict(
        m=9,
        m1=2,
        kc=4,
        target_modules="conv+linear",
        m_pattern={"downsampling_layer.1": 4},
        modules_to_save=["classifier"],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_classifier_takes_the_tuner_trains_a_step_and_merges(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    model = get_peft_model(network, AtomsConfig(**SETTINGS[name]))
    pixels, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    with torch.no_grad():
        before = model(pixel_values=pixels).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(pixel_values=pixels).logits, before, rtol=1e-3, atol=1e-4)
    assert not any("atoms_" in name for name, _ in merged.named_parameters())
