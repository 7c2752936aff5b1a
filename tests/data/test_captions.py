import json

import pytest

from sd_atoms.data.captions import caption_files, folder_captions
from sd_atoms.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder of three picture names; captions are read without a look at the pictures."""
    for name in ["a.png", "b.JPG", "c.webp"]:
        (tmp_path / name).touch()
    return tmp_path


def _paths(folder):
    return [folder / name for name in ["a.png", "b.JPG", "c.webp"]]


def _entries(folder, *entries):
    text = "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def _named(name, caption="a castle", key="text"):
    return {"file_name": name, key: caption}


def _message(folder):
    with pytest.raises(UserError) as error:
        folder_captions(folder, _paths(folder))
    return str(error.value)


def test_no_caption_files_are_no_captions(folder):
    (folder / "notes.txt").write_text("belongs to no picture")
    (folder / "a.png.txt").write_text("nor does this")
    (folder / "c.txt").mkdir()
    assert folder_captions(folder, _paths(folder)) == {}
    assert caption_files(folder, _paths(folder)) == []


def test_text_files_are_read_as_utf_8_stripped_and_on_one_line(folder):
    (folder / "a.txt").write_bytes("\ufeff  {} am Fluß \r\n".encode())
    (folder / "b.txt").write_text("two\nlines", encoding="utf-8")
    (folder / "c.txt").write_text("城の写真", encoding="utf-8")
    assert list(folder_captions(folder, _paths(folder)).values()) == ["{} am Fluß", "two lines", "城の写真"]
    assert caption_files(folder, _paths(folder)) == [folder / "a.txt", folder / "b.txt", folder / "c.txt"]


def test_metadata_takes_each_of_its_three_keys_in_any_order_with_blank_lines_and_other_keys(folder):
    more = _named("c.webp", "three\nlines\n", "prompt") | {"label": 3}
    _entries(folder, more, "", _named("./b.JPG", " two ", "caption"), _named("a.png", "one \u2028 line"), " ")
    captions = folder_captions(folder, _paths(folder))
    assert captions == dict(zip(_paths(folder), ["one   line", "two", "three lines"], strict=True))
    assert caption_files(folder, _paths(folder)) == [folder / "metadata.jsonl"]


def test_some_captions_in_text_files_and_the_others_in_metadata_are_fine(folder):
    (folder / "a.txt").write_text("one")
    _entries(folder, _named("b.JPG", "two"), _named("c.webp", "three"))
    assert [folder_captions(folder, _paths(folder))[path] for path in _paths(folder)] == ["one", "two", "three"]


def test_caption_and_upper_case_txt_files_are_read_too(folder):
    for name in ("a.TXT", "b.caption", "c.Caption"):
        (folder / name).write_text(name, encoding="utf-8")
    assert list(folder_captions(folder, _paths(folder)).values()) == ["a.TXT", "b.caption", "c.Caption"]
    assert [file.name for file in caption_files(folder, _paths(folder))] == ["a.TXT", "b.caption", "c.Caption"]


def test_two_caption_files_of_one_picture_are_named(folder):
    for name in ("a.txt", "a.caption", "b.txt", "c.txt"):
        (folder / name).write_text("x", encoding="utf-8")
    assert "a.png has 2 caption files, a.txt, a.caption; expected one" in _message(folder)


def test_pictures_of_one_stem_share_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("both")
    assert set(folder_captions(tmp_path, [tmp_path / "a.png", tmp_path / "a.jpg"]).values()) == {"both"}
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"a\.txt: is empty") as error:
        folder_captions(tmp_path, [tmp_path / "a.png", tmp_path / "a.jpg"])
    assert "\n" not in str(error.value)


def test_captions_for_some_pictures_name_those_without(folder):
    (folder / "b.txt").write_text("two")
    message = _message(folder)
    assert message.startswith(f"{folder}: 2 of 3 pictures have no caption: a.png, c.webp; ")
    assert "\n" not in message


def test_of_many_pictures_without_the_first_are_named(tmp_path):
    (tmp_path / "0.txt").write_text("one")
    with pytest.raises(UserError, match=r"8 of 9 pictures have no caption: 1.png, 2.png, 3.png, 4.png and 4 more;"):
        folder_captions(tmp_path, [tmp_path / f"{number}.png" for number in range(9)])


def test_an_empty_metadata_file_is_not_the_same_as_none(folder):
    _entries(folder)
    assert "3 of 3 pictures have no caption: a.png, b.JPG, c.webp" in _message(folder)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"file_name": "c.webp", "text": "a', "is not valid JSON"),
        ("c.webp: a castle", "is not valid JSON"),
        ('["c.webp", "a castle"]', "names no picture"),
        ({"text": "a castle"}, "names no picture"),
        ({"file_name": 3, "text": "a castle"}, "names no picture"),
        ({"file_name": "c.webp"}, "'c.webp' has no caption; expected one of text, caption, prompt"),
        ({"file_name": "c.webp", "label": "castle"}, "'c.webp' has no caption"),
        ({"file_name": "c.webp", "text": "a", "prompt": "b"}, "'c.webp' has text and prompt"),
        ({"file_name": "c.webp", "text": None}, "'c.webp' has a text that is a NoneType"),
        ({"file_name": "c.webp", "caption": ["a", "b"]}, "'c.webp' has a caption that is a list"),
        ({"file_name": "c.webp", "text": " \n "}, "'c.webp' has an empty text"),
    ],
)
def test_every_wrong_entry_is_one_line_with_its_number(folder, line, problem):
    _entries(folder, _named("a.png"), "", _named("b.JPG"), line)
    message = _message(folder)
    assert message.startswith(f"{folder / 'metadata.jsonl'}, line 4: {problem}")
    assert "expected" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["gone.png", "sub/a.png", "../a.png", "A.png", "/a.png", ""])
def test_an_entry_for_a_picture_that_is_not_there_is_named(folder, name):
    _entries(folder, *[_named(path.name) for path in _paths(folder)], _named(name))
    assert f"line 4: {name!r} is no picture directly inside this folder" in _message(folder)


def test_a_second_entry_for_a_picture_names_the_first(folder):
    _entries(folder, *[_named(path.name) for path in _paths(folder)], _named("a.png", "another"))
    assert "line 4: 'a.png' has an entry in line 1 already" in _message(folder)


def test_a_caption_in_both_places_is_refused_even_if_it_is_the_same(folder):
    (folder / "a.txt").write_text("a castle")
    _entries(folder, *[_named(path.name) for path in _paths(folder)])
    assert _message(folder).startswith(f"{folder / 'a.txt'}: a.png has a caption in metadata.jsonl too")


def test_files_that_are_not_utf_8_are_one_line_that_names_the_byte(folder):
    for path in _paths(folder):
        path.with_suffix(".txt").write_text("fine")
    (folder / "b.txt").write_bytes("a Fluß".encode("latin-1"))
    assert _message(folder).startswith(f"{folder / 'b.txt'}: is not UTF-8 (byte 5)")
    for path in _paths(folder):
        path.with_suffix(".txt").unlink()
    (folder / "metadata.jsonl").write_bytes("{}".encode("utf-16"))
    message = _message(folder)
    assert message.startswith(f"{folder / 'metadata.jsonl'}: is not UTF-8 (byte 0)")
    assert "\n" not in message


def test_all_mistakes_of_a_folder_are_one_error(folder):
    (folder / "a.txt").write_text("a castle")
    _entries(folder, _named("a.png"), _named("gone.png"), _named("b.JPG", ""))
    lines = _message(folder).splitlines()
    assert lines[0] == f"{folder}: 4 mistakes in the captions:"
    assert [line[:2] for line in lines[1:]] == ["  "] * 4
    for line, word in zip(lines[1:], ["line 2: 'gone.png'", "line 3: 'b.JPG'", "a.txt", "c.webp"], strict=True):
        assert word in line
