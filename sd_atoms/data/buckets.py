"""Sizes of about one area for pictures of many shapes, so that little of a picture is cropped."""

from collections.abc import Sequence
from fractions import Fraction

from sd_atoms.errors import UserError


def bucket_sizes(resolution_px: int, unit_px: int, widest: float = 2.0) -> tuple[tuple[int, int], ...]:
    """All (width, height) in pixels whose sides are multiples of `unit_px` and which are as large as the area allows.

    The area is at most resolution_px². To each width belongs the largest height that fits and to each height the
    largest width, so turning a size gives another one. The square of `resolution_px` is always among them.

    Args:
        resolution_px: side of the square.
        unit_px: what all sides are multiples of.
        widest: largest ratio of the longer side to the shorter, at least 1.

    Returns:
        The sizes, narrow ones first.

    Raises:
        UserError: `resolution_px` is not a multiple of `unit_px`.
    """
    side, rest = divmod(resolution_px, unit_px)
    if rest or side < 1:
        raise UserError(f"resolution: {resolution_px} is not a multiple of {unit_px}, which this base needs")
    upright = [(width, side**2 // width) for width in range(1, side + 1) if side**2 // width <= widest * width]
    sizes = {*upright, *((height, width) for width, height in upright)}
    return tuple((width * unit_px, height * unit_px) for width, height in sorted(sizes))


def nearest(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket (width, height) whose aspect ratio is the least factor away from that of `size`.

    Of several the one of the largest area, then the first. Fractions, not logarithms: machines agree on ties.
    """

    def key(bucket: tuple[int, int]) -> tuple[Fraction, int]:
        factor = Fraction(bucket[0] * size[1], bucket[1] * size[0])
        return max(factor, 1 / factor), -bucket[0] * bucket[1]

    return min(buckets, key=key)
