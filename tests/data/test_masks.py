"""Masks of pictures: where they are found, and what is refused in one line."""

import random

import numpy as np
import pytest
from PIL import Image
from test_shards import png, shard

from sd_atoms.data.concepts import find_images
from sd_atoms.data.config import Concept, DataSettings
from sd_atoms.data.images import scan_folder
from sd_atoms.errors import UserError

SIZE = (48, 32)


def picture(path, size=SIZE, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path, size=SIZE, value=255, mode="L"):
    """White on the left half."""
    image = Image.new("L", size, 0)
    image.paste(value, (0, 0, size[0] // 2, size[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path)
    return path


def found(folder, **settings):
    concept = Concept(instance_data_dir=str(folder), instance_prompt="a castle")
    (source,), notes = find_images(DataSettings(**{"masks": True, **settings}), [concept])
    return {image.name.rsplit("/", 1)[1]: image.mask for image in source.images}, notes


@pytest.mark.parametrize(
    "name", ["a.mask.png", "a.MASK.PNG", "a-masklabel.png", "masks/a.png", "masks/a.webp", "masks/a.mask.png"]
)
@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "I;16"])
def test_a_mask_is_found_by_every_name_and_read_in_every_mode(tmp_path, name, mode):
    if mode == "I;16" and name.endswith("webp"):
        pytest.skip("WebP has 8 bits")
    picture(tmp_path / "a.jpg")
    if mode == "I;16":
        pixels = np.zeros((32, 48), np.uint16)
        pixels[:, :24] = 65535
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    else:
        mask(tmp_path / name, mode=mode)
    (tmp_path / "b.txt").touch()
    masks, notes = found(tmp_path)
    assert notes == [f"Ignored in {tmp_path}: 1 .txt file: b.txt"]
    assert masks.keys() == {"a.jpg"}
    assert masks["a.jpg"].share == pytest.approx(0.5, abs=0.01)
    pixels = np.asarray(masks["a.jpg"].read())
    assert pixels[:, :20].min() > 250
    assert pixels[:, 28:].max() < 5


def test_masks_that_are_not_asked_for_are_no_pictures_and_are_said(tmp_path):
    picture(tmp_path / "a.jpg")
    mask(tmp_path / "a.mask.png")
    mask(tmp_path / "masks" / "a.png")
    masks, notes = found(tmp_path, masks=False)
    assert masks == {"a.jpg": None}
    assert notes == [f"Not used in {tmp_path}: masks (2); set masks to learn the subject alone"]
    picture(tmp_path / "other.mask.png")  # of no picture: a picture of a strange name
    assert [path.name for path in scan_folder(tmp_path).paths] == ["a.jpg", "other.mask.png"]


def test_transparency_is_the_mask_of_a_picture_without_another(tmp_path):
    opaque = Image.open(picture(tmp_path / "a.png")).convert("RGBA")
    opaque.save(tmp_path / "a.png")
    for name in ("b.png", "c.png"):
        half = Image.open(picture(tmp_path / name, seed=1)).convert("RGBA")
        half.paste(0, (12, 0, 48, 32))
        half.save(tmp_path / name)
    mask(tmp_path / "c.mask.png")
    masks, _ = found(tmp_path)
    assert masks["a.png"] is None
    assert (masks["b.png"].alpha, masks["b.png"].share) == (True, 0.25)
    assert np.asarray(masks["b.png"].read())[0].tolist() == [255] * 12 + [0] * 36
    assert (masks["c.png"].alpha, masks["c.png"].share) == (False, 0.5)  # a file says it on purpose


def test_a_picture_and_its_mask_are_turned_upright_each_by_its_own_word(tmp_path):
    turn = Image.Exif()
    turn[0x0112] = 6
    image = Image.open(picture(tmp_path / "a.png")).convert("RGBA")
    image.putalpha(Image.open(mask(tmp_path / "mask.png")))
    (tmp_path / "mask.png").unlink()
    image.save(tmp_path / "a.png", exif=turn)
    picture(tmp_path / "b.png")
    Image.open(tmp_path / "b.png").save(tmp_path / "b.png", exif=turn)
    mask(tmp_path / "b.mask.png", size=(32, 48))
    masks, _ = found(tmp_path)
    assert masks["a.png"].read().size == masks["b.png"].read().size == (32, 48)
    assert np.asarray(masks["a.png"].read())[:, 0].tolist() == [255] * 24 + [0] * 24
    assert np.asarray(masks["b.png"].read())[0].tolist() == [255] * 16 + [0] * 16


def colours(path):
    mask(path, mode="RGB")
    image = Image.open(path)
    image.putpixel((3, 3), (255, 240, 255))
    image.save(path)


def transparent(path):
    image = Image.open(mask(path, mode="RGBA"))
    image.putpixel((40, 3), (0, 0, 0, 0))
    image.save(path)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: mask(folder / "a.mask.png", size=(32, 48)),
         "a.mask.png: is of 32 x 48 px, its picture {}/a.jpg of 48 x 32 px; expected one size"),
        (lambda folder: mask(folder / "masks" / "c.png"),
         "masks/c.png: is the mask of no picture; expected one named c in {}"),
        (lambda folder: mask(folder / "c.mask.png"), "c.mask.png: is the mask of no picture"),
        (lambda folder: colours(folder / "a.mask.png"), "a.mask.png: holds colours; expected a mask of greys"),
        (lambda folder: mask(folder / "a.mask.png", value=0), "a.mask.png: is all black; expected white (255)"),
        (lambda folder: mask(folder / "a.mask.png", value=1),
         "a.mask.png: has no brighter grey than 1 of 255; expected white (255)"),
        (lambda folder: transparent(folder / "a.mask.png"), "a.mask.png: is transparent in places"),
        (lambda folder: (folder / "a.mask.png").write_bytes(b""), "a.mask.png: is empty (0 bytes)"),
        (lambda folder: (mask(folder / "a.mask.png"), mask(folder / "masks" / "a.png")),
         "a has 2 masks, a.mask.png, masks/a.png; expected one"),
        (lambda folder: None, "holds none; expected NAME.mask.png beside it or masks/NAME.png for its pictures"),
        (lambda folder: Image.new("RGBA", SIZE).save(folder / "d.png"), "d.png: its alpha channel: is all black"),
    ],
)  # fmt: skip
def test_a_bad_mask_is_one_line(tmp_path, make, problem):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg", seed=1)
    make(tmp_path)
    with pytest.raises(UserError) as error:
        found(tmp_path)
    assert problem.format(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_all_bad_masks_are_said_at_once(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.jpg")
        mask(tmp_path / f"{name}.mask.png", value=0)
    with pytest.raises(UserError) as error:
        found(tmp_path)
    assert str(error.value).splitlines()[0] == "2 of 2 masks cannot be used:"
    assert "a.mask.png" in str(error.value)
    assert "b.mask.png" in str(error.value)


def test_masks_lie_in_shards_too(tmp_path):
    white = mask(tmp_path / "m.png").read_bytes()
    shard(tmp_path / "s" / "0.tar", {"0.png": png(0), "0.mask.png": white, "1.png": png(1)})
    masks, _ = found(tmp_path / "s")
    assert masks["0.png"].share == 0.5
    assert masks["1.png"] is None
    assert found(tmp_path / "s", masks=False)[0] == {"0.png": None, "1.png": None}


def test_a_damaged_mask_is_read_or_refused(tmp_path):
    picture(tmp_path / "a.jpg")
    whole, rng = mask(tmp_path / "a.mask.png").read_bytes(), random.Random(0)
    read, refused = 0, []
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 3])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / "a.mask.png").write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            found(tmp_path)
            read += 1
        except UserError as error:
            refused.append(str(error))
    assert read
    assert refused
    assert all("a.mask.png" in text and "\n" not in text for text in refused)
