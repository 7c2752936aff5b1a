"""`bench data`: sets of pictures, from nothing and from the cache."""

import json

import pytest

from sd_atoms.cli import main


@pytest.mark.slow
def test_data_measures_sets_and_their_draws(bench, tmp_path):
    printed = bench("data", "--sizes", "6", "--folder", str(tmp_path), "--json", str(tmp_path / "data.json"))
    (entry,) = json.loads((tmp_path / "data.json").read_text())["sets"]
    assert entry["pictures"] == len(list((tmp_path / "6").iterdir())) == 6
    assert min(entry[key] for key in entry if key.endswith(("_per_second", "_per_draw"))) > 0
    assert "check + encode s" in printed


@pytest.mark.parametrize("sizes", ["", "5,", "0", "many", "-1"])
def test_sizes_that_are_none_are_refused(sizes, capsys):
    assert main(["bench", "data", "--sizes", sizes]) == 2
    assert "integers from 1 on" in capsys.readouterr().err
