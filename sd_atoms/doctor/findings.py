"""What a check has to say, how it is worded, and how all of it is listed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sd_atoms.errors import UserError, plural

LEVELS = ("error", "warning", "fact")


@dataclass(frozen=True)
class Finding:
    """Something to mend (error), to weigh (warning) or to know (fact).

    about: the setting, file or thing it is about. text: what is so; several lines where it lists files. fix: what to
    do about it, empty for most facts.
    """

    level: str
    about: str
    text: str
    fix: str = ""

    @property
    def line(self) -> str:
        """The finding on one line, worded as a UserError."""
        return " ".join(f"{self.about}: {self.text}{'; ' * bool(self.fix)}{self.fix}".split())


def report(findings: Sequence[Finding]) -> str:
    """All findings as one list, errors first, each fix after an arrow, and how many there are of each."""
    lines = []
    for level in LEVELS:
        for finding in findings:
            if finding.level == level:
                first, *rest = f"{finding.about}: {finding.text}".splitlines()
                lines += [f"{level:<8} {first}", *(f"           {line.strip()}" for line in rest)]
                lines += [f"         → {finding.fix}"] * bool(finding.fix)
    errors, warnings = (sum(finding.level == level for finding in findings) for level in LEVELS[:2])
    return "\n".join([*lines, "", f"{plural(errors, 'error')}, {plural(warnings, 'warning')}."])


def raised(check: Callable[[], object], about: str) -> list[Finding]:
    """The error that a check raises, as a finding."""
    try:
        check()
    except UserError as error:
        return [problem(error, about)]
    return []


def problem(error: UserError, about: str) -> Finding:
    """An error of a setting, file or thing as a finding about it."""
    text = str(error).removeprefix(f"{about}: ")
    return Finding("error", about, text, "mend or remove them" if "\n" in text else "")


def bytes_text(count: float) -> str:
    """A number of bytes in KB, MB or GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e3:,.0f} KB"
