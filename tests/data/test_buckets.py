import math
import random

import pytest

from sd_atoms.data.buckets import bucket_sizes, nearest
from sd_atoms.errors import UserError

SHAPES = [(side * unit, unit) for unit in (8, 32, 64) for side in (1, 2, 3, 7, 8, 12, 16, 31)]


def test_the_sizes_for_512_by_64_are_these():
    assert bucket_sizes(512, 64) == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))


@pytest.mark.parametrize("widest", [1.0, 1.5, 2.0, 3.0, 100.0])
@pytest.mark.parametrize(("resolution", "unit"), SHAPES)
def test_sizes_keep_to_unit_area_and_ratio_and_turn_into_one_another(resolution, unit, widest):
    sizes = bucket_sizes(resolution, unit, widest)
    assert (resolution, resolution) in sizes
    assert list(sizes) == sorted(set(sizes))
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % unit == height % unit == 0
        assert width * height <= resolution**2
        assert max(width, height) <= widest * min(width, height)


@pytest.mark.parametrize(("resolution", "unit"), SHAPES)
def test_no_size_could_grow_and_every_narrow_width_within_the_ratio_has_one(resolution, unit):
    sizes = dict(bucket_sizes(resolution, unit, 2.0))
    for width, height in sizes.items():
        assert width * (height + unit) > resolution**2
        assert (width + unit) * height > resolution**2
    for width in range(unit, resolution + 1, unit):
        tallest = max(h for h in range(unit, resolution**2 // width + 1, unit))
        assert sizes.get(width) == (tallest if tallest <= 2 * width else None)


@pytest.mark.parametrize(("resolution", "unit"), [(500, 64), (0, 8), (32, 64), (65, 64)])
def test_a_resolution_that_is_no_multiple_of_the_unit_names_both(resolution, unit):
    with pytest.raises(UserError, match=f"resolution: {resolution} is not a multiple of {unit}"):
        bucket_sizes(resolution, unit)


def test_nearest_is_the_bucket_of_least_distance_between_log_ratios():
    rng, buckets = random.Random(0), bucket_sizes(1024, 64, 3.0)
    for _ in range(500):
        size = rng.randint(16, 5000), rng.randint(16, 5000)
        log = math.log(size[0] / size[1])
        distances = {bucket: abs(math.log(bucket[0] / bucket[1]) - log) for bucket in buckets}
        assert distances[nearest(size, buckets)] == pytest.approx(min(distances.values()), abs=1e-12)


def test_a_turned_picture_goes_to_the_turned_bucket_and_a_bucket_to_itself():
    rng, buckets = random.Random(1), bucket_sizes(512, 64)
    assert [nearest(bucket, buckets) for bucket in buckets] == list(buckets)
    assert [nearest((3 * w, 3 * h), buckets) for w, h in buckets] == list(buckets)
    for _ in range(200):
        size = rng.randint(16, 5000), rng.randint(16, 5000)
        assert nearest(size[::-1], buckets) == nearest(size, buckets)[::-1]
    assert nearest((9000, 10), buckets) == buckets[-1]


def test_of_buckets_as_near_the_largest_wins_then_the_first():
    assert nearest((10, 10), [(64, 64), (128, 128), (96, 96)]) == (128, 128)
    assert nearest((100, 100), [(64, 96), (128, 192), (192, 128)]) == (128, 192)
    assert nearest((2, 1), [(4, 1), (10, 10)]) == (10, 10)  # a factor of 2 from either
