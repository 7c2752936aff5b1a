"""What is to be seen of the pictures: sizes, shapes, doubles, and how often each takes its turn."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sd_atoms.data.buckets import bucket_sizes, nearest
from sd_atoms.data.records import ImageRecord, ImageStats
from sd_atoms.doctor.findings import Finding
from sd_atoms.errors import plural, shortlist

FEWEST_PICTURES = 3
MOST_LOST = 0.3  # share of a picture that a square crop may cut: 0.25 of the 4:3 of most cameras, 0.33 of 3:2
LITTLE, NEARLY_ALL = 0.01, 0.99  # shares of a picture that are its subject
NEARLY_ALIKE = 2  # of 64 bits; the packaged pictures of one thing differ in 7 or more


def counted(about: str, count: int, looks: Sequence[ImageStats]) -> list[Finding]:
    """How many pictures there are, and of what sizes; too few are a warning."""
    sizes = [look.size for look in looks]
    smallest, largest = min(sizes, key=math.prod), max(sizes, key=math.prod)
    span = _size(largest) if smallest == largest else f"{_size(smallest)} to {_size(largest)}"
    limit = f"; the first {len(looks)} were looked at" if len(looks) < count else ""
    found = [Finding("fact", about, f"{plural(count, 'picture')} of {span} px{limit}")]
    if count < FEWEST_PICTURES:
        text = f"{plural(count, 'picture')} can be learned by heart with the background"
        found.append(Finding("warning", about, text, f"take {FEWEST_PICTURES} or more, from several sides"))
    return found


def training_size(size: tuple[int, int], resolution: int, unit_px: int, buckets: bool) -> tuple[int, int]:
    """(width, height) in px that a picture of `size` is trained at."""
    return nearest(size, bucket_sizes(resolution, unit_px)) if buckets else (resolution, resolution)


def enlarged(about: str, looks: Sequence[ImageStats], targets: Sequence[tuple[int, int]]) -> list[Finding]:
    """A warning about pictures smaller than their training size."""
    factors = {look: _factor(look.size, target) for look, target in zip(looks, targets, strict=True)}
    small = sorted((look for look in factors if factors[look] > 1), key=lambda look: -factors[look])
    if not small:
        return []
    worst = small[0]
    text = (
        f"{_of(small, looks)} too small and will be enlarged, by up to {factors[worst] - 1:.0%} ({worst.name}, "
        f"{_size(worst.size)} px); what is learned will be as blurred"
    )
    return [Finding("warning", about, text, "take larger pictures, or lower resolution")]


def cut(about: str, looks: Sequence[ImageStats], targets: Sequence[tuple[int, int]]) -> list[Finding]:
    """A warning about pictures whose shape is so far from the training size's that much is cropped."""
    lost = {look: _lost(look.size, target) for look, target in zip(looks, targets, strict=True)}
    far = sorted((look for look in lost if lost[look] > MOST_LOST), key=lambda look: -lost[look])
    if not far:
        return []
    worst = far[0]
    text = f"{_of(far, looks)} cropped by up to {lost[worst]:.0%} ({worst.name}, {_size(worst.size)} px)"
    square = all(width == height for width, height in targets)
    fix = "set aspect_ratio_buckets, or crop them by hand" if square else "crop them by hand, no bucket is so long"
    return [Finding("warning", about, text, fix)]


def alike(about: str, looks: Sequence[ImageStats]) -> list[Finding]:
    """A warning about pictures that are there twice, and one about those that nearly are."""
    same: dict[str, list[str]] = {}
    for look in looks:
        same.setdefault(look.digest, []).append(look.name)
    twice = [" = ".join(names) for names in same.values() if len(names) > 1]
    found = []
    if twice:
        text = f"the same picture several times: {shortlist(twice)}"
        found.append(Finding("warning", about, text, "keep one of each; it counts for more than the others"))
    firsts = {look.digest: look for look in reversed(looks)}
    seen = [look for look in looks if look.cells and firsts[look.digest] is look]
    bits = np.unpackbits(np.frombuffer(b"".join(look.cells for look in seen), dtype=np.uint8))
    signs = bits.reshape(-1, 64).astype(np.float32) * 2 - 1
    distances = (64 - signs @ signs.T) / 2  # (N, 64) @ (64, N) -> (N, N) bits
    pairs = np.argwhere(np.triu(distances <= NEARLY_ALIKE, k=1))
    if len(pairs):
        text = f"nearly the same: {shortlist([f'{seen[one].name} and {seen[other].name}' for one, other in pairs])}"
        found.append(Finding("warning", about, text, "keep one of them, unless they differ in what matters"))
    return found


def turned(about: str, looks: Sequence[ImageStats]) -> list[Finding]:
    """A fact about pictures that are turned upright as their EXIF data say."""
    names = [look.name for look in looks if look.turned]
    return [Finding("fact", about, f"turned upright, as their EXIF data say: {shortlist(names)}")] if names else []


def masks(about: str, images: Sequence[ImageRecord]) -> list[Finding]:
    """How many pictures have masks; warnings about pictures without one, and masks that are nearly empty or full."""
    own = [(Path(image.name).name, image.mask) for image in images]
    shares = [(name, mask.share) for name, mask in own if mask is not None]
    if not shares:
        return []
    span = f"{min(share for _, share in shares):.0%} to {max(share for _, share in shares):.0%}"
    found = [Finding("fact", about, f"{plural(len(shares), 'mask')}; the subject is {span} of a picture")]
    for names, what, fix in (
        ([name for name, mask in own if mask is None], "without a mask", "they are learned whole; add masks"),
        (
            [name for name, share in shares if share < LITTLE],
            "with a mask that is nearly empty",
            "white is the subject; mend these masks",
        ),
        (
            [name for name, share in shares if share > NEARLY_ALL],
            "with a mask that is nearly full",
            "they are learned whole; black is what surrounds the subject",
        ),
    ):
        if names:
            text = f"{plural(len(names), 'picture')} {what}: {shortlist(names)}"
            found.append(Finding("warning", about, text, fix))
    return found


def held_out(count: int, pictures: int) -> list[Finding]:
    """An error where no picture is left to learn from."""
    if count < pictures:
        return []
    text = f"{count} of {pictures} pictures leave none to learn from"
    return [Finding("error", "holdout_images", text, f"at most {pictures - 1} are allowed")]


def passes(examples: int, steps: int, per_step: int) -> list[Finding]:
    """How often each picture is seen; a warning where some are never."""
    seen = steps * per_step
    text = f"{plural(steps, 'step')} of {plural(per_step, 'picture')}"
    if seen >= examples or examples < 1:
        return [Finding("fact", "steps", f"{text}: each is seen {seen / max(examples, 1):,.0f} times")]
    text += f" end before the first epoch does: {examples - seen:,} of {examples:,} are never seen"
    return [Finding("warning", "steps", text, f"{math.ceil(examples / per_step):,} steps see each once")]


def _factor(size: tuple[int, int], target: tuple[int, int]) -> float:
    return max(target[0] / size[0], target[1] / size[1])


def _lost(size: tuple[int, int], target: tuple[int, int]) -> float:
    """The share of a picture that is cropped."""
    return 1 - math.prod(target) / (math.prod(size) * _factor(size, target) ** 2)


def _of(some: Sequence, all_: Sequence) -> str:
    return f"{len(some)} of {plural(len(all_), 'picture')} {'is' if len(some) == 1 else 'are'}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
