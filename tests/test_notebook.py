"""docs/quickstart.ipynb, run cell by cell as Jupyter would: lines with ! by the shell, the rest in one namespace."""

import ast
import json
import subprocess
from pathlib import Path

import pytest

NOTEBOOK = Path("docs/quickstart.ipynb").absolute()


def cells():
    return [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def run(source, namespace):
    """A cell's value, as Jupyter shows it."""
    if source.startswith("!"):
        for line in source.splitlines():
            subprocess.run(line.removeprefix("!"), shell=True, check=True)
        return None
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    shown = [run(source, namespace) for source in cells()]
    pictures = [value for value in shown if hasattr(value, "size")]
    assert len(pictures) == 4
    assert all(min(picture.size) >= 128 for picture in pictures)
    assert Path("runs/castle/export").is_dir()
    assert Path("runs/castle/share/README.md").is_file()


def test_the_notebook_has_no_outputs_and_its_cells_parse():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
    for source in cells():
        if not source.startswith("!"):
            ast.parse(source)
