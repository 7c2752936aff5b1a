"""Every method on three architectures: attached, trained for a step, saved, reloaded and merged."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import ARCHITECTURES, SIDE, write_model
from torch.nn import functional as F

from sd_atoms.classify.config import NOT_OFFERED, ClassifyConfig
from sd_atoms.classify.file import load_classifier, save_classifier
from sd_atoms.classify.models import open_classifier
from sd_atoms.classify.training import adapt, head_mask, trained_counts
from sd_atoms.errors import UserError
from sd_atoms.methods.adapters import merge_adapters
from sd_atoms.methods.table import METHODS
from sd_atoms.settings import build
from sd_atoms.sources import packaged_path

# a ResNet has no Linear layer for it; PEFT's takes the input of ConvNeXt's for a convolution's
WITHOUT = {("resnet", "oft"), ("convnext", "oft")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: write_model(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


def adapted(folder, method, **settings):
    classifier = open_classifier(str(folder), 3)
    config = build(ClassifyConfig, {"model": str(folder), "data": "x", "method": method, **settings})
    return classifier, adapt(classifier, config)


def pixels(seed=0):
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [name for name in ("head", *METHODS) if name not in NOT_OFFERED])
def test_a_trained_classifier_reloads_and_merges_to_the_same(models, tmp_path, architecture, method):
    if (architecture, method) in WITHOUT:
        with pytest.raises(UserError, match="no layer|no such layer|cannot take images"):
            adapted(models[architecture], method)
        return
    plain = open_classifier(str(models[architecture]), 3)
    classifier, _ = adapted(models[architecture], method)
    torch.testing.assert_close(classifier(pixels()), plain(pixels()), rtol=0, atol=0)
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    assert all(p.requires_grad for p in classifier.head.parameters())
    trained, of_head = trained_counts(classifier)
    assert (trained > 0) == (method != "head")
    assert of_head == sum(p.numel() for p in classifier.head.parameters())

    optimizer, labels = torch.optim.AdamW(parameters, lr=3e-2), torch.tensor([0, 1, 2, 0])
    classifier.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(pixels()), labels)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = classifier.eval()(pixels(1))
    assert not torch.equal(found, plain(pixels(1)))
    path = save_classifier(
        tmp_path / "c.safetensors", classifier, model=str(models[architecture]), method=method,
        class_names=("a", "b", "c"), training={},
    )  # fmt: skip
    again, file = load_classifier(path)
    assert (file.method, file.class_names) == (method, ("a", "b", "c"))
    with torch.no_grad():
        assert torch.equal(again(pixels(1)), found)
        if method != "head":
            merge_adapters(again.network)
            torch.testing.assert_close(again(pixels(1)), found, rtol=1e-4, atol=1e-5)


def test_batch_norms_keep_their_statistics(models):
    classifier, _ = adapted(models["resnet"], "atoms")
    before = {name: value.clone() for name, value in classifier.named_buffers()}
    assert before
    classifier.train()
    classifier(pixels()).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in classifier.named_buffers())


def test_atoms_go_to_every_convolution_with_a_kernel_above_one_and_lora_to_the_dense_layers(models):
    _, config = adapted(models["convnext"], "atoms")
    assert config.method.target == "spatial"
    classifier, config = adapted(models["convnext"], "lora")
    assert config.method.target == "dense"
    layers = [name for name, _ in classifier.network.named_parameters() if "lora_A" in name]
    assert layers
    assert not any("dwconv" in name or "classifier" in name for name in layers)


def test_block_atoms_go_to_linear_and_pointwise_layers_too(models):
    classifier, config = adapted(models["convnext"], "atoms", kc=4)
    assert config.method.target == "conv+linear"
    names = [name for name, p in classifier.network.named_parameters() if p.requires_grad]
    assert any("pwconv1" in name and "atoms_block_delta" in name for name in names)
    assert any("dwconv" in name and "atoms_delta" in name for name in names)


def test_targets_that_a_method_cannot_take_are_one_line(models):
    with pytest.raises(UserError, match="all"):
        adapted(models["resnet"], "atoms", target="all")
    classifier, _ = adapted(models["convnext"], "bitfit", target="conv")  # those with a bias
    assert trained_counts(classifier)[0] > 0


def test_what_the_head_drops_depends_on_the_sample_alone(models):
    whole = head_mask(range(8), 16, 0.5, seed=3)
    assert torch.equal(whole[5:], head_mask(range(5, 8), 16, 0.5, seed=3))
    assert not torch.equal(whole, head_mask(range(8), 16, 0.5, seed=4))
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    classifier, _ = adapted(models["resnet"], "head", head_dropout=0.5)
    plain = classifier(pixels())
    classifier.head_mask = head_mask(range(4), classifier.head.in_features, 0.5, seed=3)
    assert torch.equal(classifier(pixels()), plain)
    assert not torch.equal(classifier.train()(pixels()), plain)


def test_a_budget_sizes_the_method(models):
    classifier, config = adapted(models["resnet"], "lora", budget="1k")
    trained, _ = trained_counts(classifier)
    assert 667 <= trained <= 1500
    assert config.method.budget is None
    assert config.method.rank


def test_a_file_of_another_network_is_one_line(models, tmp_path):
    classifier, _ = adapted(models["resnet"], "atoms")
    names = dict(method="atoms", class_names=("a", "b", "c"), training={})
    path = save_classifier(tmp_path / "c.safetensors", classifier, model=str(models["resnet"]), **names)
    with pytest.raises(UserError, match="features|another architecture|other weights"):
        load_classifier(path, str(models["convnext"]))
    shutil.copytree(models["resnet"], tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    save_file({key: value * 1.3 for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="other weights"):
        load_classifier(path, str(tmp_path / "other"))


def test_a_model_that_is_no_classifier_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be opened as an image classifier"):
        open_classifier(str(packaged_path("pocket") / "unet"), 3)
    with pytest.raises(UserError, match="nowhere"):
        open_classifier(str(tmp_path / "nowhere"), 3)
