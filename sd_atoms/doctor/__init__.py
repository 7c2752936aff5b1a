"""Everything that could go wrong in a training run, found before it starts: `sd-atoms doctor`, and every start."""

from sd_atoms.doctor.examination import doctor, examine, preflight
from sd_atoms.doctor.findings import Finding, report

__all__ = ["Finding", "doctor", "examine", "preflight", "report"]
