"""What becomes of a trained classifier: a plain network, an ONNX file, maps of what it looks at."""

import json

import numpy as np
import pytest
import torch
from small import SIDE, coloured, write_classes, write_model
from transformers import AutoModelForImageClassification

from sd_atoms.classify.cam import active_shares, blocks_of, chosen_block, maps_of
from sd_atoms.classify.file import load_classifier
from sd_atoms.classify.models import open_classifier
from sd_atoms.cli import main
from sd_atoms.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of LoRA and one of atoms on one ResNet."""
    folder = tmp_path_factory.mktemp("outcome")
    write_model(folder / "model", "resnet")
    write_classes(folder / "set", 6)
    for method in ("atoms", "lora"):
        own = ["--max_train_steps=4", "--train_batch_size=4", "--lr_warmup_steps=0", "--report_to=none"]
        own += [f"--model={folder / 'model'}", f"--data={folder / 'set'}", f"--output_dir={folder / method}"]
        assert main(["classify", "train", f"--method={method}", "--learning_rate=0.05", *own]) == 0
    return folder


@pytest.mark.parametrize("method", ["atoms", "lora"])
def test_merged_it_is_a_plain_network_and_an_onnx_file(trained, tmp_path, capsys, method):
    classifier, _ = load_classifier(trained / method, str(trained / "model"))
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = classifier(pixels)
    words = ["classify", "merge", f"--classifier={trained / method}", f"--model={trained / 'model'}"]
    assert main([*words, f"--out={tmp_path / 'plain'}", f"--onnx={tmp_path / 'c.onnx'}"]) == 0
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    assert plain.config.id2label == {0: "blue", 1: "green", 2: "red"}
    with torch.no_grad():
        torch.testing.assert_close(plain(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "c.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"pixels": pixels.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert "of torch's" in capsys.readouterr().out
    assert main(words) == 2
    assert "out or onnx is required" in capsys.readouterr().err


def test_grad_cam_is_the_weighted_mean_of_the_layers_channels(trained):
    """By hand: ReLU of the channels, each times the mean gradient of the logit on it."""
    classifier, _ = load_classifier(trained / "atoms", str(trained / "model"))
    layer = blocks_of(classifier.network)[0]
    images = [coloured("red", 50), coloured("blue", 51)]
    maps = maps_of(classifier, images, [2, 0], layer)
    assert maps.shape == (2, SIDE, SIDE)

    from sd_atoms.classify.training import centre_crop
    from sd_atoms.data.images import to_unit

    own = classifier.preprocessing
    pixels = own.normalised(to_unit([centre_crop(image, own) for image in images])).requires_grad_(True)
    kept = {}
    module = classifier.network.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, inputs, out: kept.update(out=out))
    logits = classifier(pixels)
    handle.remove()
    for place, label in enumerate([2, 0]):
        (gradient,) = torch.autograd.grad(logits[place, label], kept["out"], retain_graph=True)
        weights = gradient[place].mean((1, 2))
        by_hand = torch.relu((weights[:, None, None] * kept["out"][place]).sum(0)).detach()
        large = torch.nn.functional.interpolate(by_hand[None, None], (SIDE, SIDE), mode="bilinear")[0, 0]
        torch.testing.assert_close(maps[place], large / large.max().clamp_min(1e-12), rtol=1e-4, atol=1e-5)


def test_the_active_region_is_what_is_above_half(trained):
    maps = torch.zeros(2, 4, 4)
    maps[0, :2] = 1
    maps[1, 0, 0] = 0.5
    assert active_shares(maps).tolist() == [0.5, 1 / 16]
    classifier = open_classifier(str(trained / "model"), 3)
    assert chosen_block(classifier, 1, None).endswith("stages.0")
    with pytest.raises(UserError, match="block: 9: the network has 2"):
        chosen_block(classifier, 9, None)
    for name in ("nowhere", ""):
        with pytest.raises(UserError, match="none of that name"):
            chosen_block(classifier, None, name)


def test_a_sheet_shows_several_classifiers_on_the_same_images(trained, tmp_path, capsys, monkeypatch):
    # the files name their network by its last part only
    monkeypatch.chdir(trained)
    words = ["classify", "cam", "--classifiers=atoms,lora", f"--data={trained / 'set'}", "--images=3"]
    assert main([*words, f"--out={tmp_path / 'cam.png'}", f"--json={tmp_path / 'c.json'}", "--shown=2"]) == 0
    told = json.loads((tmp_path / "c.json").read_text())
    assert [entry["classifier"] for entry in told] == ["atoms", "lora"]
    assert all(0 < entry["active"]["value"] <= 1 and entry["active"]["n"] == 3 for entry in told)
    assert (tmp_path / "cam.png").stat().st_size > 5000
    assert "active region" in capsys.readouterr().out


def test_a_network_without_maps_is_one_line(tmp_path):
    classifier = open_classifier(str(write_model(tmp_path / "vit", "vit")), 3)
    with pytest.raises(UserError, match="no map"):
        maps_of(classifier, [coloured("red", 1)], [0], "vit.layers.0")
