"""PEFT's own contract tests with our configs in place of its own.

    git clone --depth 1 https://github.com/huggingface/peft PEFT
    python tests/peft_contracts/run.py PEFT [arguments for pytest]

PEFT's tests are not packaged, so they come from a checkout; they need `pip install pytest parameterized datasets` and,
for those of its own networks, the hub. They are run from a copy: the checkout stays as it is.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CLASSES = re.compile(r"^ALL_PEFT_CONFIG_CLASSES = .*$", re.MULTILINE)  # the first line that reads the table of cases
OURS = "from sd_atoms_cases import ALL_PEFT_CONFIG_CLASSES, TEST_CASES"


def main(checkout: str, *arguments: str) -> int:
    """Runs tests/test_custom_models.py of that checkout; returns pytest's exit code."""
    here = Path(__file__).parent.resolve()
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "tests"
        shutil.copytree(Path(checkout) / "tests", tests)
        module = tests / "test_custom_models.py"
        text, lines = CLASSES.subn(OURS, module.read_text(encoding="utf-8"))
        if lines != 1:
            sys.exit(f"{module.name} of {checkout}: {lines} lines match {CLASSES.pattern!r}, one is expected")
        module.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={folder}", str(module), *arguments]
        path = os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))
        return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
