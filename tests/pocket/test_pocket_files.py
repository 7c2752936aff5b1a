import json
import shutil

import pytest

from sd_atoms.errors import UserError
from sd_atoms.pocket.manifest import MANIFEST_NAME, WEIGHTS_FOLDER, file_entries, verify_weights
from sd_atoms.sources import packaged_path


def test_packaged_names_lead_to_what_they_promise():
    assert (packaged_path("pocket") / "model_index.json").is_file()
    assert (packaged_path("pocket:clip") / "preprocessor_config.json").is_file()
    for concept in ("castle", "canal"):
        assert len(list(packaged_path(f"pocket:{concept}").glob("*.png"))) == 5


@pytest.mark.parametrize("name", ["CompVis/stable-diffusion-v1-4", "./pocket", "pocket/", "Pocket", ""])
def test_other_names_are_left_to_the_caller(name):
    assert packaged_path(name) is None


def test_unknown_packaged_names_list_what_there_is():
    with pytest.raises(
        UserError,
        match="'pocket:palace' is not packaged; there is pocket, pocket:clip, (pocket:judge, )?pocket:castle",
    ):
        packaged_path("pocket:palace")


def test_packaged_weights_are_what_the_manifest_lists():
    verify_weights()
    listed = json.loads((WEIGHTS_FOLDER / MANIFEST_NAME).read_text("utf-8"))["files"]
    assert listed == file_entries(WEIGHTS_FOLDER)


@pytest.fixture
def copied_weights(tmp_path):
    return shutil.copytree(WEIGHTS_FOLDER, tmp_path / "weights")


def test_a_changed_byte_is_noticed(copied_weights):
    file = copied_weights / "pocket-sd" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"unet.diffusion_pytorch_model\.safetensors: has sha256"):
        verify_weights(copied_weights)


def test_a_truncated_file_is_noticed(copied_weights):
    file = copied_weights / "pocket-clip" / "merges.txt"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"merges\.txt: has 6095 bytes, not the 6105"):
        verify_weights(copied_weights)


def test_a_missing_file_is_noticed(copied_weights):
    (copied_weights / "pocket-sd" / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae.config\.json: missing"):
        verify_weights(copied_weights)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_an_unusable_manifest_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(UserError, match="not a readable manifest"):
        verify_weights(tmp_path)
