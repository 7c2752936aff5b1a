import json

import pytest

from sd_atoms.errors import UserError
from sd_atoms.pocket.manifest import MANIFEST_NAME, WEIGHTS_FOLDER, file_entries
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
    listed = json.loads((WEIGHTS_FOLDER / MANIFEST_NAME).read_text("utf-8"))["files"]
    assert listed == file_entries(WEIGHTS_FOLDER)
