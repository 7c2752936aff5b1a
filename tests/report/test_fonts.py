"""Names of classes in figures: any script, any number of classes."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import fontManager

from sd_atoms.report import fonts
from sd_atoms.report.classifier import cam_sheet, confusion_figure
from sd_atoms.report.fonts import lettering

NEW, LOST = "\U00020000", "\U00020001"  # rare letters that a machine without fonts of East Asia has none for


@pytest.fixture
def font(tmp_path, monkeypatch):
    """A family of one letter, installed after matplotlib made its list of fonts."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 0))
    pen.lineTo((0, 500))
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "new"])
    builder.setupCharacterMap({ord(NEW): "new"})
    builder.setupGlyf({name: pen.glyph() for name in (".notdef", "new")})
    builder.setupHorizontalMetrics({".notdef": (500, 0), "new": (500, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "One Letter", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "one.ttf")
    monkeypatch.setattr(fontManager, "ttflist", [entry for entry in fontManager.ttflist if "DejaVu" in entry.name])
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: [str(tmp_path / "one.ttf")])
    fonts._families.cache_clear()
    yield
    fonts._families.cache_clear()


def drawn(figure):
    """Draws it, and raises for letters without a font."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FigureCanvasAgg(figure).draw()


def test_a_name_is_drawn_by_a_font_that_has_it_or_by_its_number_and_never_as_boxes(font):
    names = ["cat", NEW, f"{NEW}{LOST}", "a $5 and $x_ note", "cafe\u0301"]
    letters = lettering(names)
    assert letters.drawn == ("cat", NEW, "#2", r"a \$5 and \$x_ note", "café")
    assert letters.families == ("DejaVu Sans", "One Letter")
    assert letters.notes[1] == f"  #2 {NEW}{LOST}"
    figure, notes = confusion_figure(np.eye(5), names)
    drawn(figure)
    assert notes == letters.notes
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(letters.drawn)
    columns = [("atoms: runs/a", np.zeros((2, 8, 8, 3)), [NEW, LOST], np.zeros((2, 8, 8)))]
    figure, notes = cam_sheet([NEW, NEW], columns)
    drawn(figure)
    assert notes[1] == f"  #1 {LOST}"
    assert figure.axes[3].get_title() == "said #1"


def test_letters_that_join_go_by_number_where_matplotlib_cannot_join_them(font, monkeypatch):
    monkeypatch.setattr(fonts, "SHAPES", False)
    assert lettering(["قطة", "cat"]).drawn == ("#0", "cat")
    monkeypatch.setattr(fonts, "SHAPES", True)
    fonts._families.cache_clear()
    assert lettering(["قطة", "cat"]).drawn == ("قطة", "cat")


def test_of_many_classes_the_names_can_be_read_and_the_most_confused_are_listed():
    names = [f"class number {number}" for number in range(100)]
    counts = 40 * np.eye(100, dtype=int)
    counts[3, 7], counts[90, 2] = 5, 9
    figure, notes = confusion_figure(counts, names)
    drawn(figure)
    matrix, panel = figure.axes
    labels = [label.get_window_extent() for label in matrix.get_yticklabels()]
    assert len(labels) == 100
    assert all(above.y0 >= below.y1 - 1 for above, below in pairwise(labels))  # 1 px of leading
    for axes in (matrix, panel):
        assert figure.bbox.containsx(axes.get_tightbbox().x0)
        assert figure.bbox.containsy(axes.get_tightbbox().y0)
    shares, said = (text.get_text().splitlines()[2:] for text in panel.texts)
    assert shares == ["9 of 49", "5 of 45"]
    assert said == ["class number 90 → class number 2", "class number 3 → class number 7"]
    assert not notes
    few, _ = confusion_figure(counts[:3, :3], names[:3])
    assert [text.get_text() for text in few.axes[0].texts] == ["40"] * 3
