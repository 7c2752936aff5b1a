"""From files to pictures to tensors: the only place where pixel ranges change.

A picture is a PIL image in mode RGB, 8 bits, sRGB, upright and opaque. Everything a file can hold besides that
(rotation flags, transparency, CMYK, 16 bits, colour profiles, animation) ends in `read_image`.
"""

import contextlib
import io
import os
import random
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from sd_atoms.errors import UserError

with contextlib.suppress(ImportError):  # Pillow itself opens no HEIC
    from pillow_heif import register_heif_opener

    register_heif_opener()

# Which files of a folder count goes by their names; how a file is opened goes by its content.
EXTENSIONS = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")  # MPO: a JPEG that holds several
SMALLEST_SIDE_PX = 16

_SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini")
_SRGB_NAMES = ("sRGB", "sRGB built-in", "sRGB IEC61966-2.1")
_EXPECTED = "expected an intact PNG, JPEG, WebP, BMP, TIFF or GIF picture"
_RESAMPLING = {name.lower(): value for name, value in Image.Resampling.__members__.items()}
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_EXIF = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MASK = re.compile(r"(.+)(\.mask|-masklabel)", re.IGNORECASE)  # of a.png: a.mask.png, or as OneTrainer calls it
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
RESAMPLING = tuple(sorted(_RESAMPLING))
_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageFolder:
    """The image files directly inside a folder and whatever else lies there, both in natural order."""

    paths: tuple[Path, ...]
    others: tuple[Path, ...]


def scan_folder(folder: str | os.PathLike) -> ImageFolder:
    """Lists the image files directly inside `folder`; nothing is opened.

    Files are sorted by name, numbers by value (img2 before img10), alike on every machine and in every locale.
    Sub-folders, hidden files, system files such as Thumbs.db, other extensions and masks of pictures that are there
    (a.mask.png of a.jpg) are ignored and listed as `others`.

    Raises:
        UserError: the folder is missing, not a folder, not readable, empty or without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}; expected a folder of images")
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); expected a folder of images") from error
    paths = [entry for entry in entries if _why_ignored(entry) is None]
    stems = {path.stem for path in paths}
    paths = [path for path in paths if masked_stem(path) not in stems]
    kept = set(paths)
    others = [entry for entry in entries if entry not in kept]
    if not paths:
        found = "; ".join(ignored_notes(others)) or "it is empty"
        raise UserError(f"{folder}: no images ({found}); expected files named {', '.join(EXTENSIONS)}")
    return ImageFolder(tuple(paths), tuple(others))


def ignored_notes(others: Sequence[Path]) -> tuple[str, ...]:
    """Entries that are no images in a few words, one note per reason: "3 .txt files: a.txt, b.txt, c.txt"."""
    ignored = {}
    for entry in others:
        ignored.setdefault(_why_ignored(entry) or "mask", []).append(entry.name)
    return tuple(
        f"{len(names)} {reason}{'s' * (len(names) > 1)}: {', '.join(names[:3])}{', …' * (len(names) > 3)}"
        for reason, names in ignored.items()
    )


def masked_stem(path: Path) -> str | None:
    """The stem of the picture whose mask a file is by its name: a of a.mask.png; None of any other name."""
    match = _MASK.fullmatch(path.stem)
    return match and match[1]


def read_image(source: str | os.PathLike | bytes, label: str | None = None) -> Image.Image:
    """Reads a file as an upright, opaque 8-bit sRGB picture (PIL, mode RGB) that carries no metadata.

    EXIF rotation is applied, transparency is laid over white, of an animation the first frame is taken, 16-bit,
    integer and float greys are scaled, colours are brought from the file's ICC profile to sRGB.

    Args:
        source: path of the file, or its content.
        label: what messages call it; None is its path.

    Raises:
        UserError: the file is missing, empty, truncated, no picture, of a format that this Pillow cannot open, too
            small (under 16 px on a side) or so large that it may be a decompression bomb.
    """
    return read_upright(source, _opaque_srgb, label)


def read_upright(
    source: str | os.PathLike | bytes, convert: Callable[[Image.Image], Image.Image], label: str | None = None
) -> Image.Image:
    """What `convert` makes of a file's loaded picture, turned upright.

    `source`, `label` and errors are as of `read_image`; a UserError that `convert` raises is passed on.
    """
    label = label or (f"{len(source)} bytes" if isinstance(source, bytes) else str(Path(source)))
    content = b""
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with open_image(content) as image:
            if image.format not in FORMATS:
                raise UserError(f"{label}: is a {image.format} file; {_EXPECTED}")
            if min(image.size) < SMALLEST_SIDE_PX:
                size = f"{image.width} x {image.height} px"
                raise UserError(f"{label}: {size} is too small; at least {SMALLEST_SIDE_PX} px a side are needed")
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            picture = convert(image)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        if content[4:8] == b"ftyp" and content[8:12] in _HEIC:
            raise UserError(f"{label}: is a HEIC picture; `pip install pillow-heif` to open such") from error
        what = "holds no picture that this Pillow recognises" if content else "is empty (0 bytes)"
        raise UserError(f"{label}: {what}; {_EXPECTED}") from error
    except Image.DecompressionBombError as error:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
        raise UserError(f"{label}: holds more than {limit}; scale it down first") from error
    except Exception as error:  # decoders raise whatever their parsers trip over: SyntaxError, struct.error, EOFError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{label}: cannot be read ({reason}); {_EXPECTED}") from error
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def open_image(content: bytes) -> Image.Image:
    """A file's picture as Pillow opens it, to be closed; raises what Pillow raises.

    Text in a PNG file, such as the workflow of a program that drew it, is left out: Pillow refuses long ones.
    """
    return Image.open(io.BytesIO(_without_text(content) if content.startswith(_PNG) else content))


def _without_text(png: bytes) -> bytes:
    """A PNG file without its text, but for what tells of rotation; from anything broken on as it is."""
    kept, start = [_PNG], len(_PNG)
    while len(head := png[start : start + 8]) == 8:
        length, kind = struct.unpack(">I4s", head)
        end = start + 12 + length  # length, kind, content, checksum
        if kind not in (b"tEXt", b"zTXt", b"iTXt") or png.startswith(_PNG_EXIF, start + 8):
            kept.append(png[start:end])
        start = end
    return b"".join([*kept, png[start:]])


def fit(
    image: Image.Image, size_px: int | tuple[int, int], *, center_crop: bool, resample: str, rng: random.Random | None
) -> Image.Image:
    """Resizes a picture until it just covers a size and crops what is over.

    Args:
        image: a picture in mode RGB or L.
        size_px: side of a square, or width and height.
        center_crop: crop the middle; otherwise `rng` picks the place, and without an `rng` it is the middle too.
        resample: bicubic, bilinear, box, hamming, lanczos or nearest.
        rng: draws the two offsets of a random crop; not touched by a center crop.

    Raises:
        UserError: `resample` is not one of those names.
    """
    if resample not in _RESAMPLING:
        raise UserError(f"interpolation {resample!r}: expected one of {', '.join(RESAMPLING)}")
    wide, high = (size_px, size_px) if isinstance(size_px, int) else size_px
    if wide * image.height >= high * image.width:
        width, height = wide, wide * image.height // image.width
    else:
        width, height = high * image.width // image.height, high
    if center_crop or rng is None:
        left, top = (width - wide) // 2, (height - high) // 2
    else:
        left, top = rng.randint(0, width - wide), rng.randint(0, height - high)
    # The filter reads the pixels around the box as well, so this is the crop of the resized whole, which is never
    # built: a panorama costs no more than its crop.
    x0, x1 = left * image.width / width, (left + wide) * image.width / width
    y0, y1 = top * image.height / height, (top + high) * image.height / height
    return image.resize((wide, high), _RESAMPLING[resample], (x0, y0, x1, y1))


def flip(image: Image.Image) -> Image.Image:
    """The mirror image: left and right change places."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def to_unit(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size -> (N, 3, H, W) float32 in [0, 1].

    Raises:
        ValueError: no pictures, a mode other than RGB, or several sizes.
    """
    modes, sizes = {image.mode for image in images}, {image.size for image in images}
    if modes != {"RGB"} or len(sizes) != 1:
        raise ValueError(f"expected RGB pictures of one size, got modes {sorted(modes)} and sizes {sorted(sizes)}")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 255  # (N, H, W, 3) uint8 -> (N, 3, H, W)


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size -> (N, 3, H, W) float32 in [-1, 1]; raises as `to_unit` does."""
    return to_unit(images) * 2 - 1


def file_content(
    path: str | os.PathLike, start: int = 0, size: int = -1, *, expected: str = "", name: str | None = None
) -> bytes:
    """`size` bytes of a file from `start` on, -1 for the rest of it.

    Raises:
        UserError: it cannot be read; the line calls it `name`, or by its path, and says what was expected.
    """
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        text = f"{name or path}: cannot be read ({error.strerror})"
        raise UserError(f"{text}; expected {expected}" if expected else text) from error


def natural_key(name: str) -> tuple:
    """Sorts names with numbers by value, img2 before img10, alike in every locale and process."""
    # "img10.png" -> ("img", 10, ".png"): text and numbers always alternate, so keys compare; the name breaks ties
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _why_ignored(entry: Path) -> str | None:
    extension = entry.suffix.lower()
    if entry.name.startswith("."):
        return "hidden file"
    if entry.is_dir():
        return "sub-folder"
    if entry.name.lower() in _SYSTEM_FILES:
        return "system file"
    if extension not in EXTENSIONS:
        return f"{extension or 'extensionless'} file"
    return None if entry.is_file() else "broken link or special file"


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The opacity of a loaded image of any mode, in mode L; None of one that knows no transparency."""
    return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None


def grey_of(image: Image.Image) -> Image.Image:
    """A loaded image of greys alone, of any mode -> L; of colours their brightness."""
    return (_grey_8_bit(image) if image.mode.startswith(("I", "F")) else image).convert("L")


def _opaque_srgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode -> RGB, on a canvas of its own that has none of the file's metadata."""
    alpha, profile = alpha_of(image), image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _grey_8_bit(image)
    elif image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("RGB")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(_srgb(image, profile), mask=alpha)
    return canvas


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Mode L, RGB, CMYK or LAB -> RGB, by the profile if there is one that works and it is not sRGB already."""
    srgb = ImageCms.createProfile("sRGB")
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), srgb, outputMode="RGB")
    if profile is not None:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if ImageCms.getProfileDescription(source).strip() not in _SRGB_NAMES:
                return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # broken, or made for another colour space: such a file is shown by every viewer as if it had none
    return image.convert("RGB")


def _grey_8_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit integer or float grey -> L; `convert("L")` would clip all of them at 255.

    White is 65535 for integers and 1, 255 or 65535 for floats, the first that holds every value. Values beyond that,
    negative ones too, have no white of their own and are stretched from the smallest to the largest.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(low + high):
        raise ValueError("holds values that are not finite")
    whites = (1, 255, 65535) if image.mode == "F" else (65535,)
    black, white = next(((0, white) for white in whites if low >= 0 and high <= white), (low, high))
    return Image.fromarray(((values - black) * (255 / max(white - black, 1e-12))).round().astype(np.uint8))
