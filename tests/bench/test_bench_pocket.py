"""`bench pocket`: match shares of a base of the pocket world, and its sheet."""

import json
import re

import pytest
from PIL import Image

from sd_atoms.bench import pocket
from sd_atoms.cli import main


def test_pocket_counts_pictures_whose_best_prompt_is_their_own(bench, monkeypatch, tmp_path):
    """Grey pictures all have the same best prompt: their own once in twenty, or forty; the renderer's have others."""
    grey = Image.new("RGB", (128, 128), "grey")
    monkeypatch.setattr(pocket, "generate", lambda pipe, requests, sampling: [(request, grey) for request in requests])
    told = bench("pocket", "--seeds", "2", "--json", str(tmp_path / "a.json"), "--sheet", str(tmp_path / "a.png"))
    assert re.search("castle.*canal.*held_out", told, re.DOTALL)
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["benchmark"] == "pocket"
    own = {"base": "pocket", "judge": "pocket:clip", "seeds": 2, "guidance_scale": 3.0, "scheduler": "euler_a"}
    assert own.items() <= result["settings"].items()
    match = result["match"]
    for name, share, count in (("castle", 1 / 20, 40), ("canal", 1 / 20, 40), ("held_out", 1 / 40, 40)):
        assert (match[name]["base"]["value"], match[name]["base"]["n"]) == (pytest.approx(share), count)
        assert match[name]["base"]["low"] <= share <= match[name]["base"]["high"]
        assert match[name]["renderer"]["value"] > 0.7
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 8 * 160  # four pairs in each of ten lines
        assert sheet.height > 10 * 160


def test_pocket_sheet_is_not_written_over(bench, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"kept")
    assert main(["bench", "pocket", "--sheet", str(tmp_path / "a.png")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == b"kept"
