"""`bench sparse`: two solvers on the same rows."""

import json

from sd_atoms.cli import main


def test_sparse_compares_both_solvers_on_the_same_rows(bench, tmp_path):
    file = tmp_path / "sparse.json"
    printed = bench("sparse", "--channels", "16", "--m", "6", "--rounds", "1", "--json", str(file))
    result = json.loads(file.read_text())
    ours, theirs = result["solvers"]["ours"], result["solvers"]["coordinate descent"]
    assert result["rows"] == 256
    assert ours["objective"] <= theirs["objective"]
    assert f"coordinate descent takes {result['ratio']:.1f} times as long" in printed


def test_a_negative_penalty_is_refused(capsys):
    assert main(["bench", "sparse", "--l1", "-0.1"]) == 2
    assert "--l1: -0.1 is out of range, 0.0 or more is allowed" in capsys.readouterr().err
