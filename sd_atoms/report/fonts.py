"""Names in any script in a figure: by the installed fonts that have their letters, or by number, never as boxes."""

import contextlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import matplotlib
from matplotlib import ft2font
from matplotlib.font_manager import findSystemFonts, fontManager

USUAL = "DejaVu Sans"  # comes with matplotlib
REGULAR = 400  # weight
# from matplotlib 3.11 on; before, letters that join, combine or run from right to left come out as others
SHAPES = hasattr(ft2font, "__libraqm_version__")


@dataclass(frozen=True)
class Lettering:
    """How names are drawn.

    drawn: what stands for each: the name itself, or "#3" for the one that has number 3, from 0. families: of fonts,
    for matplotlib's `font.family`. numbered: "#3 name" of each that goes by its number.
    """

    drawn: tuple[str, ...]
    families: tuple[str, ...]
    numbered: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """A line on the names that go by their numbers, and one of all of them; none where there are none."""
        if not self.numbered:
            return []
        count = f"{len(self.numbered)} of {len(self.drawn)} names"
        heading = f"no font here draws {count}; the figure has their numbers (a font such as Noto Sans CJK mends it):"
        return [heading, f"  {', '.join(self.numbered)}"]


def lettering(names: Sequence[str], most: int | None = None) -> Lettering:
    """How to draw names, cut after `most` letters: with the usual font, with others that are installed where it lacks
    letters, or by number.
    """
    texts = [unicodedata.normalize("NFC", " ".join(name.split())) for name in names]
    texts = [text if most is None or len(text) <= most else f"{text[: most - 1]}…" for text in texts]
    families, lost = _families(frozenset("".join(texts)))
    drawn, numbered = [], []
    for number, (name, text) in enumerate(zip(names, texts, strict=True)):
        if text and lost.isdisjoint(text):
            drawn.append(text.replace("$", r"\$"))  # between two, matplotlib reads maths
        else:
            drawn.append(f"#{number}")
            numbered.append(f"#{number} {name}")
    return Lettering(tuple(drawn), families, tuple(numbered))


@cache
def _families(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families that together have the letters, and the letters that none has."""
    unshaped = frozenset() if SHAPES else frozenset(filter(_is_shaped, letters))
    families, left = [USUAL], letters - unshaped - {" "} - _letters(fontManager.findfont(USUAL))
    files = _installed() if left else {}
    while left:  # those with the most first, so that a word is of one font
        best = max(sorted(files), key=lambda name: len(left & _letters(files[name])), default=None)
        if best is None or left.isdisjoint(_letters(files[best])):
            break
        families.append(best)
        left -= _letters(files[best])
    return tuple(families), left | unshaped


def _installed() -> dict[str, str]:
    """Family -> its file, of what is installed."""
    known, own, files = {entry.fname for entry in fontManager.ttflist}, matplotlib.get_data_path(), {}
    for path in sorted(set(findSystemFonts()) - known):  # matplotlib keeps its list of fonts, however old it is
        with contextlib.suppress(Exception):  # files of fonts are broken in every way
            fontManager.addfont(path)
    for entry in sorted(fontManager.ttflist, key=lambda entry: (abs(entry.weight - REGULAR), entry.fname)):
        # those that come with matplotlib are for maths, or draw every letter as a box
        if entry.style == "normal" and not entry.fname.startswith(own) and "Last Resort" not in entry.name:
            files.setdefault(entry.name, entry.fname)
    return files


@cache
def _letters(path: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, ft2font.FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):  # of an old list: it is gone, or another file
        return frozenset()


def _is_shaped(letter: str) -> bool:
    return unicodedata.bidirectional(letter) in ("R", "AL") or unicodedata.category(letter) in ("Mn", "Mc")
