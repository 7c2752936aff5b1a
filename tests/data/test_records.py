import hashlib
import io
import pickle
import sys
import zipfile
from functools import partial

import datasets
import numpy as np
import pytest
from PIL import Image

from sd_atoms.data import records
from sd_atoms.data.checked import usable
from sd_atoms.data.records import ImageRecord, folder_images, image_record, image_stats, table_images
from sd_atoms.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tables that a test makes are forgotten with it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _bytes(picture, format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def _lying_on_its_side():
    """A JPEG of 64 x 32 px whose flag says that it is 32 x 64 px, red at the top."""
    picture, exif = Image.new("RGB", (64, 32), "blue"), Image.Exif()
    picture.paste("red", (0, 0, 32, 32))
    exif[0x0112] = 6
    return _bytes(picture, "JPEG", exif=exif, quality=95)


def _is_upright(picture):
    red, blue = picture.getpixel((16, 8)), picture.getpixel((16, 56))
    return picture.size == (32, 64) and red[0] > 240 > red[2] and blue[2] > 240 > blue[0]


def _save(folder, contents, **columns):
    """A table of encoded pictures as save_to_disk writes it."""
    features = datasets.Features({"image": datasets.Image()} | {name: datasets.Value("string") for name in columns})
    rows = {"image": [{"bytes": content, "path": None} for content in contents], **columns}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(folder)
    return str(folder)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_what_operating_systems_leave_in_a_folder_is_no_picture(tmp_path):
    for name in ["img10.png", "img2.png"]:
        _noise(32, 32).save(tmp_path / name)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "Thumbs.db").touch()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    pictures, ignored = folder_images(str(tmp_path), captions=True)
    assert [picture.name for picture in pictures] == [str(tmp_path / "img2.png"), str(tmp_path / "img10.png")]
    assert [picture.caption for picture in pictures] == [None, None]
    assert set(ignored) == {"2 hidden files: .DS_Store, .ipynb_checkpoints", "1 system file: Thumbs.db"}


def test_files_are_read_upright(tmp_path):
    (tmp_path / "a.jpg").write_bytes(_lying_on_its_side())
    pictures, _ = folder_images(tmp_path, captions=False)
    assert _is_upright(pictures[0].read())


def test_every_picture_has_the_caption_beside_it_and_caption_files_are_not_called_ignored(tmp_path):
    for number, name in enumerate(["a.png", "b.png", "c.png"]):
        _noise(32, 32, number).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "third"}')
    (tmp_path / "notes.txt").write_text("no caption")
    pictures, ignored = folder_images(tmp_path, captions=True)
    assert [picture.caption for picture in pictures] == ["first", "second", "third"]
    assert ignored == ("1 .txt file: notes.txt",)

    pictures, ignored = folder_images(tmp_path, captions=False)
    assert [picture.caption for picture in pictures] == [None] * 3
    assert ignored == ("3 .txt files: a.txt, b.txt, notes.txt", "1 .jsonl file: metadata.jsonl")


def test_captions_that_cannot_be_used_stop_a_folder_before_a_picture_is_read(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    (tmp_path / "a.txt").write_text("first")
    with pytest.raises(UserError, match=r"1 of 2 pictures have no caption: b\.png"):
        folder_images(tmp_path, captions=True)
    assert len(folder_images(tmp_path, captions=False)[0]) == 2


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    _noise(32, 32).save(path)
    assert image_record(path).digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    with pytest.raises(UserError, match=r"a\.png: cannot be read \(No such file"):
        image_record(path).digest()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_rows_of_a_saved_table_are_read_upright_in_order_and_named_by_their_number(tmp_path):
    name = _save(tmp_path / "t", [_bytes(_noise(40, 32)), _lying_on_its_side()], text=["one", " two\nlines "])
    pictures = table_images(name, caption_column="text")
    assert [picture.name for picture in pictures] == [f"{name}[train] row 0", f"{name}[train] row 1"]
    assert [picture.caption for picture in pictures] == ["one", "two lines"]
    assert pictures[0].read().tobytes() == _noise(40, 32).tobytes()
    assert _is_upright(pictures[1].read())
    assert [picture.caption for picture in table_images(name)] == [None, None]


def test_a_folder_of_images_and_its_metadata_load_as_a_table_without_rotating_twice(tmp_path):
    (tmp_path / "a.jpg").write_bytes(_lying_on_its_side())
    _noise(32, 32).save(tmp_path / "b.png")
    lines = ['{"file_name": "a.jpg", "text": "first"}', '{"file_name": "b.png", "text": "second"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    pictures = table_images(str(tmp_path), caption_column="text")
    assert [picture.caption for picture in pictures] == ["first", "second"]
    assert _is_upright(pictures[0].read())


def test_pictures_in_a_zip_file_are_read_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("a.jpg", _lying_on_its_side())
        archive.writestr("b.jpg", _lying_on_its_side())
    pictures = table_images(str(tmp_path))
    assert [_is_upright(picture.read()) for picture in pictures] == [True, True]
    (tmp_path / "pictures.zip").unlink()
    with pytest.raises(UserError, match=r"\[train\] row 1: cannot be read \(No such file"):
        pictures[1].read()


@pytest.mark.parametrize("kind", ["image", "struct", "binary"])
def test_parquet_files_hold_pictures_in_three_ways(tmp_path, kind):
    contents = [_lying_on_its_side(), _bytes(_noise(32, 32))]
    rows = contents if kind == "binary" else [{"bytes": content, "path": None} for content in contents]
    features = {
        "image": datasets.Image(),
        "struct": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "binary": datasets.Value("binary"),
    }
    table = datasets.Dataset.from_dict({"photo": rows}, features=datasets.Features({"photo": features[kind]}))
    table.to_parquet(tmp_path / "train.parquet")
    pictures = table_images(str(tmp_path), image_column="photo")
    assert _is_upright(pictures[0].read())
    assert pictures[1].read().tobytes() == _noise(32, 32).tobytes()


def test_only_the_first_rows_are_taken_if_so_many_are_asked_for(tmp_path):
    name = _save(tmp_path / "t", [_bytes(_noise(32, 32, seed)) for seed in range(5)], text=[*"abc", "", ""])
    assert [picture.caption for picture in table_images(name, caption_column="text", most=3)] == ["a", "b", "c"]
    assert len(table_images(name, most=50)) == 5


def test_splits_are_found_and_a_missing_one_lists_those_there_are(tmp_path):
    table = datasets.Dataset.from_dict({"image": [_noise(32, 32)]}, features=datasets.Features(image=datasets.Image()))
    datasets.DatasetDict(test=table, extra=table).save_to_disk(tmp_path / "saved")
    assert table_images(str(tmp_path / "saved"), split="extra")[0].name == f"{tmp_path / 'saved'}[extra] row 0"
    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files" / "test.parquet")
    assert len(table_images(str(tmp_path / "files"), split="test")) == 1
    for folder, splits in [("saved", "test, extra"), ("files", "test")]:
        with pytest.raises(UserError) as error:
            table_images(str(tmp_path / folder))
        assert str(error.value) == f"{tmp_path / folder}: no split 'train'; expected one of {splits}"


@pytest.mark.parametrize("columns", [{"image_column": "photo"}, {"caption_column": "photo"}])
def test_a_missing_column_lists_those_there_are(tmp_path, columns):
    name = _save(tmp_path / "t", [_bytes(_noise(32, 32))], text=["one"])
    with pytest.raises(UserError) as error:
        table_images(name, **columns)
    assert str(error.value) == f"{name}[train]: no column 'photo'; expected one of image, text"


def test_a_column_of_something_else_is_refused(tmp_path):
    name = _save(tmp_path / "t", [_bytes(_noise(32, 32))], text=["one"])
    with pytest.raises(UserError, match=r"column 'text' holds .*string.*; expected pictures"):
        table_images(name, image_column="text")
    with pytest.raises(UserError, match=r"column 'image' holds .*Image.*; expected text"):
        table_images(name, caption_column="image")


def test_empty_captions_of_a_table_are_listed_at_once(tmp_path):
    name = _save(tmp_path / "t", [_bytes(_noise(32, 32))] * 4, text=["one", None, "three", " \n"])
    with pytest.raises(UserError) as error:
        table_images(name, caption_column="text")
    assert str(error.value).splitlines() == [
        "2 of 4 captions cannot be used:",
        f"  {name}[train] row 1: column 'text' is empty; expected a caption",
        f"  {name}[train] row 3: column 'text' is empty; expected a caption",
    ]


def test_a_table_without_rows_is_refused(tmp_path, monkeypatch):
    table = datasets.Dataset.from_dict({"image": []}, features=datasets.Features(image=datasets.Image()))
    table.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="cannot be loaded"):  # `datasets` itself refuses it
        table_images(str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=table))
    with pytest.raises(UserError, match=r"\[train\]: has no rows"):
        table_images(str(tmp_path))


@pytest.mark.parametrize("name", ["someone/pictures", "pictures", "./nowhere", "a/b/c", "*"])
def test_a_table_that_is_nowhere_or_out_of_reach_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        table_images(name)
    assert str(error.value).startswith(f"{name}: cannot be loaded (")
    assert "expected the id of a data set on the hub" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_broken_are_one_line_that_says_how(tmp_path):
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"cannot be loaded \(.*[Pp]arquet") as error:
        table_images(str(tmp_path))
    assert "\n" not in str(error.value)


def test_without_datasets_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "sd-atoms\[datasets\]"'):
        table_images("someone/pictures")


def test_a_table_is_loaded_without_leave_to_run_its_code(tmp_path, monkeypatch):
    table, asked = datasets.load_from_disk(_save(tmp_path / "t", [_bytes(_noise(32, 32))])), []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.DatasetDict(train=table)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    table_images("someone/pictures", config="small", revision="v2")
    assert asked == [(("someone/pictures", "small"), {"revision": "v2"})]


def test_the_digest_of_a_row_is_that_of_its_bytes(tmp_path):
    files = [_bytes(_noise(32, 64)), _bytes(_noise(32, 64, 1)), _bytes(_noise(32, 64))]
    digests = [row.digest() for row in table_images(_save(tmp_path / "t", files))]
    assert digests == [hashlib.sha256(content).hexdigest() for content in files]


# --- both ------------------------------------------------------------------------------------------------------------


def test_pictures_survive_the_way_to_another_process(tmp_path):
    _noise(32, 32).save(tmp_path / "a.png")
    pictures, _ = folder_images(tmp_path, captions=False)
    pictures += table_images(_save(tmp_path / "t", [_lying_on_its_side()], text=["one"]), caption_column="text")
    there = pickle.loads(pickle.dumps(pictures))
    for one, other in zip(pictures, there, strict=True):
        assert (one.name, one.caption, one.digest()) == (other.name, other.caption, other.digest())
        assert one.read().tobytes() == other.read().tobytes()


def _some_bad(tmp_path):
    """One good picture, one that is misnamed and one that is cut short, as files and as rows."""
    whole = _bytes(_noise(64, 64), "JPEG")
    contents = [whole, b"version https://git-lfs.github.com/spec/v1", whole[:-500]]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in zip(["a.jpg", "b.png", "c.jpg"], contents, strict=True):
        (folder / name).write_bytes(content)
    rows = table_images(_save(tmp_path / "t", [*contents, b""]))
    null = datasets.Dataset.from_dict({"image": [None]}, features=datasets.Features(image=datasets.Image()))
    null.save_to_disk(tmp_path / "null")
    return folder_images(folder, captions=False)[0] + rows + table_images(str(tmp_path / "null"))


def test_all_bad_pictures_are_reported_at_once_and_good_ones_not(tmp_path):
    pictures = _some_bad(tmp_path)
    bad = [pictures[number] for number in (1, 2, 4, 5, 6, 7)]
    with pytest.raises(UserError) as error:
        usable(pictures, "error")
    lines = str(error.value).splitlines()
    assert lines[0] == "6 of 8 images cannot be used:"
    assert [line.split(": ")[0] for line in lines[1:]] == [f"  {picture.name}" for picture in bad]
    words = ["no picture", "truncated", "no picture", "truncated", "is empty", "holds no picture"]
    for line, word in zip(lines[1:], words, strict=True):
        assert word in line


def test_of_many_small_pictures_the_first_are_told_and_the_others_counted():
    small = [ImageRecord(f"{number}.png", None, lambda: _bytes(_noise(8, 8))) for number in range(300)]
    with pytest.raises(UserError) as error:
        usable(small, "error")
    heading, *lines = str(error.value).splitlines()
    assert heading == "300 of 300 images cannot be used:"
    assert [line.split(":")[0] for line in lines] == [*(f"  {number}.png" for number in range(20)), "  … and 280 more"]


def test_one_bad_picture_is_one_line_and_none_is_silence(tmp_path):
    pictures = _some_bad(tmp_path)
    for on_bad_image in ("error", "skip"):
        (good,), notes = usable(pictures[:1], on_bad_image)
        assert (good.name, good.stats, notes) == (pictures[0].name, image_stats(pictures[0]), ())
    with pytest.raises(UserError) as error:
        usable(pictures[:2], "error")
    assert str(error.value).startswith(f"{pictures[1].name}: holds no picture")
    assert "\n" not in str(error.value)


def test_bad_pictures_can_be_skipped_and_are_named(tmp_path):
    pictures = _some_bad(tmp_path)
    good, notes = usable(pictures, "skip")
    assert [picture.name for picture in good] == [pictures[0].name, pictures[3].name]
    assert len(notes) == 6
    assert notes[0].startswith(f"{pictures[1].name}: holds no picture")


def test_skipping_everything_is_an_error(tmp_path):
    pictures = _some_bad(tmp_path)
    with pytest.raises(UserError, match="2 of 2 images cannot be used:"):
        usable(pictures[1:3], "skip")


def test_the_order_of_pictures_is_kept_and_each_is_read_once():
    reads = []

    def content(number):
        reads.append(number)
        return _bytes(_noise(16, 16, number))

    pictures = [ImageRecord(str(n), None, partial(content, n)) for n in range(50)]
    good, notes = usable(pictures, "skip")
    assert [record.name for record in good] == [str(n) for n in range(50)]
    assert [record.digest() for record in good] == [hashlib.sha256(content(n)).hexdigest() for n in range(50)]
    assert sorted(reads) == sorted([*range(50)] * 2)  # once by the check, once by this test
    assert notes == ()


def test_what_was_checked_is_not_decoded_again(tmp_path, monkeypatch):
    pictures = folder_images(_folder_of(tmp_path / "p", _lying_on_its_side(), _bytes(_noise(40, 32)), _grey()), False)[
        0
    ]
    first, _ = usable(pictures, "error", cache=tmp_path / "cache")
    monkeypatch.setattr(records, "read_image", None)
    again, _ = usable(pictures[::-1], "error", cache=tmp_path / "cache")
    assert [picture.stats for picture in again] == [picture.stats for picture in first[::-1]]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    monkeypatch.undo()
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:30])
    assert usable(pictures, "error", cache=tmp_path / "cache")[0] == first


def _folder_of(folder, *contents):
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number}.png").write_bytes(content)
    return folder


def _grey():
    return _bytes(Image.new("RGB", (32, 32), (90, 90, 90)))
