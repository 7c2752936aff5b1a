import numpy as np
import pytest
from PIL import Image

from sd_atoms.report.grid import EMPTY, Block, image_grid, labelled_blocks

COLOURS = [(200, 30, 30), (30, 160, 60), (40, 60, 200), (220, 160, 30), (130, 40, 160), (20, 150, 170)]
PROMPT = "The <castle> is surrounded by an otherworldly landscape, with glowing mushrooms and mystical creatures."


def _wrapped(pictures, captions, columns, **options):
    return labelled_blocks([Block("", pictures, captions)], columns, **options)


def _solid(index, size=(128, 128)):
    return Image.new("RGB", size, COLOURS[index])


def _box(sheet, colour):
    """(left, top, right, bottom) of all pixels of exactly this colour, which must fill it."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    assert len(rows), f"{colour} is not on the sheet"
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert len(rows) == (box[2] - box[0]) * (box[3] - box[1])
    return tuple(int(side) for side in box)


def _ink(sheet, region):
    """Share of dark grey pixels in (left, top, right, bottom)."""
    pixels = np.asarray(sheet.crop(region)).astype(int)
    return float(((pixels.max(axis=2) < 120) & (np.ptp(pixels, axis=2) < 10)).mean())


def _margin_is_white(sheet, width_px=6):
    pixels = np.asarray(sheet).copy()
    pixels[width_px:-width_px, width_px:-width_px] = 255
    return bool((pixels == 255).all())


def test_cells_stand_in_even_rows_and_columns():
    sheet = image_grid([[_solid(0), _solid(1), _solid(2)], [_solid(3), _solid(4), _solid(5)]], ["one", "two"])
    boxes = [_box(sheet, colour) for colour in COLOURS]
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(256, 256)}
    for first, second in ((0, 3), (1, 4), (2, 5)):
        assert boxes[first][0] == boxes[second][0]
    assert len({box[1] for box in boxes[:3]}) == len({box[1] for box in boxes[3:]}) == 1
    gaps = {boxes[1][0] - boxes[0][2], boxes[2][0] - boxes[1][2], boxes[3][1] - boxes[0][3]}
    assert len(gaps) == 1
    assert sheet.width - boxes[2][2] == sheet.height - boxes[5][3] == boxes[0][1]


def test_labels_stand_beside_their_rows_and_above_their_columns():
    sheet = image_grid([[_solid(0), _solid(1)], [_solid(2), _solid(3)]], ["first row", ""], ["", "seed 1"], title="T")
    boxes = [_box(sheet, colour) for colour in COLOURS[:4]]
    assert _ink(sheet, (0, boxes[0][1], boxes[0][0], boxes[0][3])) > 0.005
    assert _ink(sheet, (0, boxes[2][1], boxes[2][0], boxes[2][3])) == 0
    heads = boxes[0][1] - 50, boxes[0][1]
    assert _ink(sheet, (boxes[1][0], heads[0], boxes[1][2], heads[1])) > 0.005
    assert _ink(sheet, (boxes[0][0], heads[0], boxes[0][2], heads[1])) == 0
    assert _ink(sheet, (0, 0, sheet.width, heads[0])) > 0.001  # the title


@pytest.mark.parametrize(
    "label", [PROMPT, "a" * 300, "runs/" * 60, "城堡" * 60, "W" * 40 + " , jf " + "/" * 40, "\ud800\x00\n\t🏰"]
)
def test_no_label_runs_off_the_sheet_or_into_a_picture(label):
    pictures = [_solid(0), _solid(1)]
    sheets = [
        image_grid([pictures], [label], [label, "b"], title=label),
        _wrapped(pictures, [label, "b"], 2, title=label),
        labelled_blocks([Block(label, pictures)], 2, title=label),
    ]
    for sheet in sheets:
        assert _margin_is_white(sheet)
        for colour in COLOURS[:2]:
            left, top, right, bottom = _box(sheet, colour)
            assert (right - left, bottom - top) == (256, 256)


@pytest.mark.parametrize("word", ["a" * 20, "castle "])
def test_every_letter_of_a_long_label_is_on_the_sheet(word):
    def ink(label):
        sheet = image_grid([[_solid(0)]], [label])
        return _ink(sheet, (0, 0, *sheet.size)) * sheet.width * sheet.height

    assert ink(word * 20) == pytest.approx(20 * ink(word), rel=0.05)
    assert image_grid([[_solid(0)]], [word * 50]).height > image_grid([[_solid(0)]], [word]).height


def test_a_short_column_label_stands_on_its_column_when_another_one_wraps():
    sheet = image_grid([[_solid(0), _solid(1)]], None, ["short", "a label that takes several lines"])
    left, top, right, _ = _box(sheet, COLOURS[0])
    assert _ink(sheet, (left, top - 50, right, top)) > 0.005
    assert _ink(sheet, (left, 0, right, top - 50)) == 0


def test_signs_that_the_font_lacks_are_spelt_out_or_shown_as_a_box():
    def row(label):
        return np.asarray(image_grid([[_solid(0)]], [label]))

    assert (row("cafe 3x3 - a") == row("café 3×3 – a")).all()
    assert _ink(image_grid([[_solid(0)]], ["城堡"]), (0, 0, 60, 300)) > 0


def test_small_pictures_are_enlarged_as_whole_square_pixels():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 200, (128, 128, 3), dtype=np.uint8))
    sheet = np.asarray(_wrapped([noise], None, 1))
    margin = (sheet.shape[0] - 256) // 2
    cell = sheet[margin:-margin, margin:-margin]
    assert (cell == np.asarray(noise).repeat(2, axis=0).repeat(2, axis=1)).all()


@pytest.mark.parametrize(("side", "shown"), [(16, 160), (100, 200), (160, 160), (256, 256), (512, 256)])
def test_pictures_without_a_wish_are_shown_at_160_to_256_px_and_whole_multiples(side, shown):
    left, top, right, bottom = _box(_wrapped([_solid(0, (side, side))], None, 1), COLOURS[0])
    assert (right - left, bottom - top) == (shown, shown)


def test_a_cell_size_is_kept():
    left, _, right, _ = _box(_wrapped([_solid(0)], None, 1, cell_px=300), COLOURS[0])
    assert right - left == 300


def test_pictures_of_several_sizes_keep_their_aspect_in_the_middle_of_equal_cells():
    sheet = image_grid([[_solid(0), _solid(1, (64, 128)), _solid(2, (40, 20))]])
    whole, tall, wide = (_box(sheet, colour) for colour in COLOURS[:3])
    assert (tall[2] - tall[0], tall[3] - tall[1]) == (128, 256)
    assert (wide[2] - wide[0], wide[3] - wide[1]) == (256, 128)
    assert wide[1] - whole[1] == whole[3] - wide[3] == 64


def test_cells_of_wide_pictures_are_no_taller_than_the_pictures():
    sheet = image_grid([[_solid(0, (512, 128))], [_solid(1, (512, 128))]])
    assert _box(sheet, COLOURS[1])[1] - _box(sheet, COLOURS[0])[3] < 20


def test_missing_pictures_are_grey_cells_of_the_same_size():
    sheet = image_grid([[_solid(0), None]], ["row"])
    picture, empty = _box(sheet, COLOURS[0]), _box(sheet, EMPTY)
    assert (empty[2] - empty[0], empty[1], empty[3]) == (256, picture[1], picture[3])
    assert image_grid([[None]]).getpixel((80, 80)) == EMPTY


def test_captions_stand_under_their_pictures():
    sheet = _wrapped([_solid(index) for index in range(5)], ["one", "", "three", "four", "five"], 2)
    boxes = [_box(sheet, colour) for colour in COLOURS[:5]]
    assert boxes[0][0] == boxes[2][0] == boxes[4][0] < boxes[1][0] == boxes[3][0]
    below = [_ink(sheet, (left, bottom, right, bottom + 30)) for left, _, right, bottom in boxes]
    assert [share > 0.002 for share in below] == [True, False, True, True, True]


def test_blocks_are_separated_and_headed():
    sheet = labelled_blocks([Block("Your photos", [_solid(0), _solid(1), _solid(2)]), Block("Others", [_solid(3)])], 2)
    first, second, third, fourth = (_box(sheet, colour) for colour in COLOURS[:4])
    assert first[1] == second[1] < third[1] < fourth[1]
    assert first[0] == third[0] == fourth[0]
    assert _ink(sheet, (0, 0, sheet.width, first[1])) > 0.003
    inked = [y for y in range(third[3], fourth[1]) if _ink(sheet, (0, y, sheet.width, y + 1)) > 0]
    assert inked[0] - third[3] > 1.5 * (fourth[1] - inked[-1])  # a heading is nearer to its own pictures


def test_sheets_are_the_same_every_time():
    sheets = [labelled_blocks([Block(PROMPT, [_solid(0), None])], 5, title="T") for _ in range(2)]
    assert sheets[0].tobytes() == sheets[1].tobytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda: image_grid([]),
        lambda: image_grid([[]]),
        lambda: image_grid([[_solid(0)], [_solid(0), _solid(1)]]),
        lambda: image_grid([[_solid(0)]], ["a", "b"]),
        lambda: image_grid([[_solid(0)]], None, []),
        lambda: _wrapped([], [], 2),
        lambda: _wrapped([_solid(0)], ["a", "b"], 2),
        lambda: _wrapped([_solid(0)], None, 0),
        lambda: labelled_blocks([], 2),
        lambda: labelled_blocks([Block("a", [])], 2),
        lambda: labelled_blocks([Block("a", [_solid(0)])], 0),
    ],
)
def test_grids_that_do_not_add_up_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()
