"""What the docs point to exists."""

import re
from pathlib import Path

import pytest

NAMED = sorted(set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", Path("docs/field-issues.md").read_text(encoding="utf-8"))))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_every_test_that_the_docs_name_exists(file, test):
    assert re.search(rf"^def {test}\(", Path(file).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", [Path("README.md"), *sorted(Path("docs").glob("*.md"))], ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert target.startswith("http") or (path.parent / target).exists(), target
