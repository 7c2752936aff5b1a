import importlib.util
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin, features

from sd_atoms.data import images
from sd_atoms.data.images import fit, flip, ignored_notes, read_image, scan_folder, to_tensor, to_unit
from sd_atoms.data.records import image_record, image_stats
from sd_atoms.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def _two_tone(left=RED, right=BLUE, size=(48, 32)):
    picture = Image.new("RGB", size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return picture


def _noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _pixels(picture):
    return np.asarray(picture).astype(int)


def _close(got, wanted, tolerance=3):
    return np.abs(np.array(got) - np.array(wanted)).max() <= tolerance


# --- folders ---------------------------------------------------------------------------------------------------------


def test_numbers_in_names_sort_by_value_whatever_order_the_disk_lists_them_in(tmp_path, monkeypatch):
    names = ["img10.png", "img2.png", "IMG3.png", "img02.png", "a.jpg", "img2b.png", "7.png", "10.png", "Ä1.webp"]
    for name in names:
        (tmp_path / name).touch()
    wanted = ["7.png", "10.png", "a.jpg", "img02.png", "img2.png", "img2b.png", "IMG3.png", "img10.png", "Ä1.webp"]
    for listing in (sorted(tmp_path.iterdir()), sorted(tmp_path.iterdir(), reverse=True)):
        monkeypatch.setattr(type(tmp_path), "iterdir", lambda folder, listing=listing: iter(listing))
        assert [path.name for path in scan_folder(tmp_path).paths] == wanted
        monkeypatch.undo()


def test_what_operating_systems_and_users_leave_in_a_folder_is_ignored_and_named(tmp_path):
    for name in [".DS_Store", "._a.jpg", "Thumbs.db", "desktop.ini", "a.txt", "b.txt", "c.txt", "d.txt", "m.jsonl"]:
        (tmp_path / name).touch()
    for name in ["README", "photo.JPG", "b.jpeg", "c.WebP"]:
        (tmp_path / name).touch()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "masks.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = scan_folder(str(tmp_path))
    assert [path.name for path in found.paths] == ["b.jpeg", "c.WebP", "photo.JPG"]
    assert set(ignored_notes(found.others)) == {
        "3 hidden files: ._a.jpg, .DS_Store, .ipynb_checkpoints",
        "2 system files: desktop.ini, Thumbs.db",
        "4 .txt files: a.txt, b.txt, c.txt, …",
        "1 .jsonl file: m.jsonl",
        "1 extensionless file: README",
        "1 sub-folder: masks.png",
        "1 broken link or special file: gone.png",
    }


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.touch(), "is a file"),
        (lambda folder: folder.mkdir(), "no images (it is empty)"),
        (lambda folder: (folder / "masks").mkdir(parents=True), "no images (1 sub-folder: masks)"),
    ],
)
def test_a_folder_without_images_is_one_line_that_names_it(tmp_path, prepare, problem):
    folder = tmp_path / "photos"
    prepare(folder)
    with pytest.raises(UserError) as error:
        scan_folder(folder)
    assert str(error.value).startswith(f"{folder}: {problem}")
    assert "expected" in str(error.value)
    assert "\n" not in str(error.value)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "gif", "webp", "jpg", "avif"])
def test_every_format_gives_the_same_upright_rgb_picture(tmp_path, extension):
    if extension == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"a.{extension}"
    _two_tone().save(path, quality=95)
    picture = read_image(path)
    assert (picture.mode, picture.size) == ("RGB", (48, 32))
    assert _close(picture.getpixel((4, 16)), RED, 6)
    assert _close(picture.getpixel((44, 16)), BLUE, 6)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_rotation_is_undone_once(tmp_path, extension, orientation):
    upright = Image.new("RGB", (48, 32), WHITE)
    upright.paste(RED, (0, 0, 24, 16))  # the corner at the upper left is red, the one at the upper right green
    upright.paste(GREEN, (24, 0, 48, 16))
    stored = {  # what a camera writes so that the flag brings it back, from the EXIF definition of the flag
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.rotate(180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.rotate(90, expand=True),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.rotate(-90, expand=True),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{extension}"
    stored.save(path, exif=exif, quality=95)
    picture = read_image(path)
    assert picture.size == (48, 32)
    assert _close(picture.getpixel((6, 6)), RED, 8)
    assert _close(picture.getpixel((42, 6)), GREEN, 8)
    assert _close(picture.getpixel((6, 28)), WHITE, 8)


def test_a_broken_exif_block_does_not_cost_the_picture(tmp_path):
    _two_tone().save(tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF header at all", quality=95)
    assert read_image(tmp_path / "a.jpg").size == (48, 32)


def test_transparency_of_every_kind_is_laid_over_white(tmp_path):
    alpha = Image.linear_gradient("L").resize((32, 32))
    red = Image.new("RGBA", (32, 32), RED)
    red.putalpha(alpha)
    red.save(tmp_path / "rgba.png")
    wanted = 255 - _pixels(alpha)  # green and blue fade to white where alpha is 0
    got = _pixels(read_image(tmp_path / "rgba.png"))
    assert (got[..., 0] == 255).all()
    assert np.abs(got[..., 1] - wanted).max() <= 1

    grey = Image.merge("LA", [Image.new("L", (32, 32), 0), alpha])
    grey.save(tmp_path / "la.png")
    assert np.abs(_pixels(read_image(tmp_path / "la.png"))[..., 2] - wanted).max() <= 1

    palette = _two_tone().quantize(2, dither=Image.Dither.NONE)
    blue = palette.getpixel((47, 0))
    for name in ("palette.png", "palette.gif"):
        palette.save(tmp_path / name, transparency=blue)
        picture = read_image(tmp_path / name)
        assert picture.getpixel((0, 0)) == RED
        assert picture.getpixel((47, 0)) == WHITE

    _two_tone().save(tmp_path / "key.png", transparency=BLUE)  # one colour of an RGB picture
    assert read_image(tmp_path / "key.png").getpixel((47, 0)) == WHITE


def test_cmyk_becomes_rgb_and_is_not_inverted(tmp_path):
    _two_tone().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    picture = read_image(tmp_path / "a.jpg")
    assert _close(picture.getpixel((4, 16)), RED, 8)
    assert _close(picture.getpixel((44, 16)), BLUE, 8)


@pytest.mark.parametrize("extension", ["png", "tiff"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, extension):
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (32, 1))
    path = tmp_path / f"a.{extension}"
    Image.fromarray(ramp).save(path)
    got = _pixels(read_image(path))
    assert np.abs(got - np.arange(256)[None, :, None]).max() == 0


@pytest.mark.parametrize(("value", "shown"), [(257 * 10, 10), (200, 1)])
def test_16_bit_grey_is_not_stretched_when_it_is_dark(tmp_path, value, shown):
    Image.fromarray(np.full((32, 32), value, np.uint16)).save(tmp_path / "a.png")
    assert (_pixels(read_image(tmp_path / "a.png")) == shown).all()


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_and_integer_greys_find_their_white(tmp_path, white):
    ramp = np.tile(np.linspace(0, white, 256), (32, 1))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    assert np.abs(_pixels(read_image(tmp_path / "float.tiff")) - np.arange(256)[None, :, None]).max() == 0
    if white == 65535:
        Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "integer.tiff")
        assert np.abs(_pixels(read_image(tmp_path / "integer.tiff")) - np.arange(256)[None, :, None]).max() == 0


def test_values_beyond_any_white_are_stretched_and_values_that_are_not_finite_refused(tmp_path):
    ramp = np.tile(np.linspace(-3, 7, 256, dtype=np.float32), (32, 1))
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    got = _pixels(read_image(tmp_path / "a.tiff"))
    assert (got[:, 0] == 0).all()
    assert (got[:, -1] == 255).all()
    ramp[3, 3] = np.nan
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="not finite"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("extension", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, extension):
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    path = tmp_path / f"a.{extension}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert read_image(path).getpixel((16, 16)) == RED


def test_black_and_white_pictures_become_0_and_255(tmp_path):
    _two_tone((0, 0, 0), WHITE).convert("1").save(tmp_path / "a.png")
    assert _pixels(read_image(tmp_path / "a.png"))[0, [0, -1], 0].tolist() == [0, 255]


def test_colours_are_brought_from_the_profile_to_srgb_and_the_profile_is_gone(tmp_path):
    # A 3-channel profile without a file of its own: the sRGB one with red and blue swapped, so pure red reads as blue.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")
    renamed = swapped.replace("built-in".encode("utf-16-be"), "swapped!".encode("utf-16-be"))
    _two_tone().save(tmp_path / "renamed.png", icc_profile=renamed)
    picture = read_image(tmp_path / "renamed.png")
    assert _close(picture.getpixel((0, 0)), BLUE)
    assert _close(picture.getpixel((47, 0)), RED)
    assert picture.info == {}

    _two_tone().save(tmp_path / "named_srgb.png", icc_profile=swapped)  # by its name there is nothing to convert
    assert read_image(tmp_path / "named_srgb.png").getpixel((0, 0)) == RED


def test_transparent_pixels_stay_white_under_a_profile(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = srgb.replace("built-in".encode("utf-16-be"), "renamed!".encode("utf-16-be"))
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 16, 32))
    picture.save(tmp_path / "a.png", icc_profile=other)
    assert _close(read_image(tmp_path / "a.png").getpixel((0, 0)), RED)
    assert read_image(tmp_path / "a.png").getpixel((31, 0)) == WHITE


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_profile_that_is_broken_or_of_another_colour_space_is_passed_over(tmp_path, mode):
    picture = _two_tone().convert(mode)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    wrong = b"no profile" if mode == "RGB" else srgb.replace("built-in".encode("utf-16-be"), b"\0x" * 8)
    picture.save(tmp_path / "with.tiff", icc_profile=wrong)
    picture.save(tmp_path / "without.tiff")
    assert (_pixels(read_image(tmp_path / "with.tiff")) == _pixels(read_image(tmp_path / "without.tiff"))).all()


def test_pictures_saved_again_carry_nothing_of_the_file_they_came_from(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    _two_tone().save(tmp_path / "a.jpg", exif=exif, icc_profile=srgb)
    picture = read_image(tmp_path / "a.jpg")
    picture.save(tmp_path / "again.png")
    again = Image.open(tmp_path / "again.png")
    assert (again.size, dict(again.getexif()), "icc_profile" in again.info) == ((32, 48), {}, False)


# --- files that cannot be used ---------------------------------------------------------------------------------------


def _bad_files(folder):
    """Writes one file of each kind; gives name -> a word of the message."""
    buffer = io.BytesIO()
    _noise(64, 64).save(buffer, "JPEG")
    (folder / "truncated.jpg").write_bytes(buffer.getvalue()[:-1000])
    (folder / "text.png").write_text("version https://git-lfs.github.com/spec/v1")
    (folder / "empty.jpg").touch()
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    Image.new("RGB", (1, 1)).save(folder / "1x1.png")
    Image.new("RGB", (400, 15)).save(folder / "thin.png")
    _two_tone().save(folder / "vector.eps")
    (folder / "vector.eps").rename(folder / "vector.png")
    (folder / "folder.png").mkdir()
    return {
        "truncated.jpg": "truncated",
        "text.png": "no picture",
        "empty.jpg": "0 bytes",
        "photo.heic": "HEIC",
        "1x1.png": "1 x 1 px is too small; at least 16 px",
        "thin.png": "400 x 15 px",
        "vector.png": "EPS",
        "folder.png": "",
        "missing.png": "No such file",
    }


def test_every_bad_file_is_one_line_that_starts_with_its_path(tmp_path):
    for name, word in _bad_files(tmp_path).items():
        with pytest.raises(UserError) as error:
            read_image(tmp_path / name)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / name}: ")
        assert word in message
        assert "\n" not in message


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    _two_tone().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(images, "_opaque_srgb", lambda image: pytest.fail("decoded"))
    with pytest.raises(UserError, match="million pixels"):
        read_image(tmp_path / "a.png")


def test_a_heic_photo_is_opened_or_names_the_package_that_opens_it(tmp_path):
    path = tmp_path / "a.heic"
    if importlib.util.find_spec("pillow_heif") is None:
        path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
        with pytest.raises(UserError, match=r"a\.heic: is a HEIC picture; `pip install pillow-heif`"):
            read_image(path)
    else:
        Image.new("RGB", (64, 32), "red").save(path)
        assert read_image(path).size == (64, 32)


@pytest.mark.parametrize("kind", ["text", "compressed text", "international text"])
def test_long_text_in_a_png_costs_no_pixel(tmp_path, kind):
    image = Image.new("RGB", (32, 16), "red")
    note = PngImagePlugin.PngInfo()
    add = note.add_itxt if kind == "international text" else note.add_text
    add("workflow", "x" * 2_000_000, zip=kind != "text")
    image.save(tmp_path / "a.png", pnginfo=note)
    assert read_image(tmp_path / "a.png").tobytes() == image.tobytes()
    assert image_stats(image_record(tmp_path / "a.png")).size == (32, 16)


def test_16_px_is_just_large_enough(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == (16, 16)


def test_a_file_in_memory_reads_as_the_file_on_disk_and_is_called_by_its_label(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    _two_tone().save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    assert read_image(content).size == (32, 48)
    assert (_pixels(read_image(content)) == _pixels(read_image(tmp_path / "a.jpg"))).all()
    for damaged, word in [(b"", "is empty (0 bytes)"), (b"text", "no picture"), (content[:-100], "truncated")]:
        with pytest.raises(UserError) as error:
            read_image(damaged, "table row 3")
        assert str(error.value).startswith("table row 3: ")
        assert word in str(error.value).lower()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp", "tiff", "bmp"])
def test_random_damage_gives_a_picture_or_a_user_error_and_nothing_else(tmp_path, extension, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # damaged sizes are to cost no memory
    buffer = io.BytesIO()
    _noise(32, 32).save(buffer, {"jpg": "JPEG", "tiff": "TIFF"}.get(extension, extension.upper()))
    whole, path, rng = buffer.getvalue(), tmp_path / f"a.{extension}", random.Random(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(min(4, len(damaged))):
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert read_image(path).mode == "RGB"
        except UserError:
            refused += 1
    assert refused > 10


# --- crops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("size", [(97, 64), (64, 131), (300, 200), (40, 50), (64, 64)])
def test_fit_is_the_center_crop_of_the_whole_picture_resized(resample, size):
    picture = Image.effect_noise(size, 80).convert("RGB")
    width, height = 64 * size[0] // min(size), 64 * size[1] // min(size)
    whole = picture.resize((width, height), Image.Resampling[resample.upper()])
    left, top = (width - 64) // 2, (height - 64) // 2
    wanted = _pixels(whole.crop((left, top, left + 64, top + 64)))
    got = fit(picture, 64, center_crop=True, resample=resample, rng=None)
    assert (got.mode, got.size) == ("RGB", (64, 64))
    difference = np.abs(_pixels(got) - wanted)
    assert (difference > 1).mean() < (0.05 if resample == "nearest" else 0.01)  # nearest: ties may fall either way


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_fit_to_a_box_is_the_crop_of_the_whole_picture_resized_until_it_covers_the_box(resample):
    for size, box in [((200, 100), (64, 64)), ((200, 100), (96, 32)), ((90, 140), (96, 32)), ((90, 140), (32, 96))]:
        picture = Image.effect_noise(size, 15).convert("RGB")  # faint: what clips depends on which side goes first
        scale = max(box[0] / size[0], box[1] / size[1])
        width, height = int(size[0] * scale + 1e-9), int(size[1] * scale + 1e-9)
        left, top = (width - box[0]) // 2, (height - box[1]) // 2
        whole = picture.resize((width, height), Image.Resampling[resample.upper()])
        got = fit(picture, box, center_crop=True, resample=resample, rng=None)
        assert got.size == box
        difference = np.abs(_pixels(got) - _pixels(whole.crop((left, top, left + box[0], top + box[1]))))
        assert (difference > 1).mean() < 0.01


def test_fit_to_a_square_box_is_fit_to_its_side_bit_for_bit_and_draws_the_same_place():
    sizes, places = random.Random(0), (random.Random(1), random.Random(1))
    for _ in range(50):
        picture, side = _noise(sizes.randint(16, 200), sizes.randint(16, 200)), sizes.choice([16, 33, 128])
        one, two = (
            fit(picture, size, center_crop=False, resample="bicubic", rng=rng)
            for size, rng in zip([side, (side, side)], places, strict=True)
        )
        assert one.tobytes() == two.tobytes()
    assert places[0].getstate() == places[1].getstate()


def test_a_picture_of_the_shape_of_its_box_loses_nothing():
    ramp = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (48, 1))).convert("RGB")
    assert fit(ramp, (96, 48), center_crop=False, resample="bicubic", rng=random.Random(0)).tobytes() == ramp.tobytes()


def test_flip_changes_left_and_right_and_twice_is_nothing():
    picture = _noise(31, 17)
    assert (_pixels(flip(picture)) == _pixels(picture)[:, ::-1]).all()
    assert flip(flip(picture)).tobytes() == picture.tobytes()


def test_random_crops_depend_on_the_generator_alone_and_reach_both_ends():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1))).convert("RGB")

    def lefts(seed, count=200):
        rng = random.Random(seed)
        crops = [fit(ramp, 100, center_crop=False, resample="bicubic", rng=rng) for _ in range(count)]
        return [crop.getpixel((0, 0))[0] for crop in crops]

    assert lefts(1) == lefts(1)
    assert lefts(1) != lefts(2)
    assert min(lefts(1, 2000)) == 0
    assert max(lefts(1, 2000)) == 100


def test_a_center_crop_leaves_the_generator_alone_and_no_generator_means_the_center():
    picture, rng = _noise(90, 60), random.Random(0)
    state = rng.getstate()
    first = fit(picture, 32, center_crop=True, resample="bicubic", rng=rng)
    second = fit(picture, 32, center_crop=False, resample="bicubic", rng=None)
    assert rng.getstate() == state
    assert (_pixels(first) == _pixels(second)).all()


def test_odd_sizes_never_ask_for_pixels_outside_the_picture():
    rng = random.Random(0)
    for _ in range(300):
        picture = Image.new("RGB", (rng.randint(16, 400), rng.randint(16, 400)))
        size_px = rng.choice([16, 97, 128, 256])
        assert fit(picture, size_px, center_crop=False, resample="lanczos", rng=rng).size == (size_px, size_px)
        box = (size_px, rng.choice([16, 97, 128, 256]))
        assert fit(picture, box, center_crop=False, resample="lanczos", rng=rng).size == box


def test_an_unknown_interpolation_lists_the_known_ones():
    with pytest.raises(UserError, match="'cubic'.*bicubic, bilinear, box"):
        fit(_two_tone(), 16, center_crop=True, resample="cubic", rng=None)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _all_values():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return [Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], axis=2)), _noise(16, 16)]


def test_all_256_values_survive_the_way_to_a_tensor():
    pictures = _all_values()
    tensor = to_tensor(pictures)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((2, 3, 16, 16), torch.float32, True)
    assert (tensor.min().item(), tensor.max().item()) == (-1.0, 1.0)
    for picture, values in zip(pictures, tensor, strict=True):
        back = ((values + 1) * 127.5).round().permute(1, 2, 0)  # (3, H, W) -> (H, W, 3)
        assert (back.int().numpy() == _pixels(picture)).all()


def test_channels_rows_and_columns_land_where_they_belong():
    picture = Image.new("RGB", (20, 16), (255, 0, 51))
    picture.putpixel((19, 2), (0, 255, 0))
    unit = to_unit([picture])
    assert unit.shape == (1, 3, 16, 20)
    assert unit[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert unit[0, :, 2, 19].tolist() == [0, 1, 0]


@pytest.mark.parametrize("convert", [to_tensor, to_unit])
@pytest.mark.parametrize(
    ("pictures", "observed"),
    [
        ([], r"\[\]"),
        ([Image.new("L", (16, 16))], "'L'"),
        ([Image.new("RGB", (16, 16)), Image.new("RGB", (16, 17))], r"\(16, 17\)"),
    ],
)
def test_pictures_that_are_no_rgb_batch_are_refused_by_what_was_observed(convert, pictures, observed):
    with pytest.raises(ValueError, match=observed):
        convert(pictures)
