"""Pictures in webdataset shards."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from sd_atoms.data.concepts import find_images
from sd_atoms.data.config import Concept, DataSettings
from sd_atoms.data.shards import find_shards, shard_images
from sd_atoms.errors import UserError


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def shard(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two shards of three pictures, with captions and labels."""
    one = {"s0.png": png(0), "s0.txt": b"a castle\n", "s0.cls": b"3", "deep/s0.PNG": png(1), "deep/s0.txt": b"a lake"}
    shard(tmp_path / "shards" / "0.tar", one)
    shard(tmp_path / "shards" / "1.tar", {"s1.txt": b"a {} at night", "s1.png": png(2)})
    (tmp_path / "shards" / "nshards.txt").write_text("2")
    return tmp_path / "shards"


def test_pictures_come_in_order_with_their_captions_and_content(folder):
    records = shard_images(find_shards(folder), captions=True)
    assert [record.name for record in records] == [
        f"{folder}/0.tar/s0.png", f"{folder}/0.tar/deep/s0.PNG", f"{folder}/1.tar/s1.png",
    ]  # fmt: skip
    assert [record.caption for record in records] == ["a castle", "a lake", "a {} at night"]
    assert [record.content() for record in pickle.loads(pickle.dumps(records))] == [png(0), png(1), png(2)]
    assert records[0].read().size == (48, 32)
    assert {record.caption for record in shard_images(find_shards(folder), captions=False)} == {None}


def test_a_folder_or_file_of_shards_stands_for_instance_data_dir(folder):
    for place, count in ((folder, 3), (folder / "1.tar", 1)):
        concept = Concept(instance_data_dir=str(place), instance_prompt="a castle")
        (source,), _ = find_images(DataSettings(captions=True), [concept])
        assert len(source.images) == count
        assert all(record.stats.size == (48, 32) for record in source.images)


def test_other_folders_hold_no_shards_even_beside_an_archive(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    shard(tmp_path / "backup.tar", {"b.png": png(1)})
    assert find_shards(tmp_path) == find_shards(tmp_path / "a.png") == find_shards(tmp_path / "none") == []


def test_hidden_files_of_macos_are_no_shards_and_no_pictures(folder):
    for name in ("._0.tar", "._a.png"):
        (folder / name).write_bytes(b"Mac OS X")
    assert [path.name for path in find_shards(folder)] == ["0.tar", "1.tar"]


@pytest.mark.parametrize(
    ("content", "captions", "message"),
    [
        (b"no tar file at all", False, r"0\.tar: cannot be read .*expected an uncompressed tar file"),
        ({"s0.cls": b"3"}, False, r"0\.tar: no pictures in it"),
        ({"s0.png": png(0)}, True, r"0\.tar/s0\.png: has no caption; expected an entry s0\.txt beside it"),
        ({"s0.png": png(0), "s0.txt": b"\xff\xfe"}, True, r"0\.tar/s0\.txt: is not UTF-8 text"),
        ({"s0.png": png(0), "s0.txt": b" \n"}, True, r"0\.tar/s0\.txt: is empty; expected a caption"),
    ],
)
def test_a_malformed_shard_is_one_line(tmp_path, content, captions, message):
    path = tmp_path / "0.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shard(path, content)
    with pytest.raises(UserError, match=message) as caught:
        shard_images([path], captions)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_cut_short_is_named(tmp_path):
    path = shard(tmp_path / "0.tar", {"s0.png": png(0), "s1.png": png(1)})
    path.write_bytes(path.read_bytes()[: 512 + len(png(0)) // 2])
    with pytest.raises(UserError, match=r"0\.tar: cannot be read \(.*"):
        shard_images([path], False)
