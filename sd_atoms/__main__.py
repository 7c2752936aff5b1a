"""`python -m sd_atoms`."""

import sys

from sd_atoms.cli import main

sys.exit(main())
