import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as torchvision_transforms

from evaluation.views import (
    Pass,
    View,
    centre_offset,
    crop_offsets,
    crops_passes,
    multi_scale_views,
    pass_views,
    resized_size,
    whole_passes,
)
from unitdist.errors import ConfigError


def test_the_defaults_give_42_views() -> None:
    views = multi_scale_views(375, 500)
    assert len(views) == 42
    assert [sum(view.scale_px == scale for view in views) for scale in (224, 256, 384, 480, 640)] == [2, 10, 10, 10, 10]
    assert sum(view.mirrored for view in views) == 21


def test_coordinates_of_a_500x375_image() -> None:
    # 224 * 500 / 375 = 298.67 and 256 * 500 / 375 = 341.33, truncated; (298 - 224) / 2 = 37; (341 - 224) / 2 = 58.5 -> 58.
    views = multi_scale_views(375, 500, (224, 256))
    places = [(v.resized_height, v.resized_width, v.top, v.left, v.mirrored) for v in views]
    windows = [(0, 0), (0, 117), (32, 0), (32, 117), (16, 58)]
    assert places == [
        (224, 298, 0, 37, False),
        (224, 298, 0, 37, True),
        *[(256, 341, top, left, False) for top, left in windows],
        *[(256, 341, top, left, True) for top, left in windows],
    ]


def test_a_portrait_image_is_the_landscape_one_turned() -> None:
    wide = multi_scale_views(375, 500)
    tall = multi_scale_views(500, 375)
    assert {(v.resized_width, v.resized_height, v.left, v.top, v.mirrored) for v in wide} == {
        (v.resized_height, v.resized_width, v.top, v.left, v.mirrored) for v in tall
    }


def test_halves_go_to_the_even_pixel() -> None:
    assert [centre_offset(size, 224) for size in (224, 225, 226, 227, 228, 229, 231)] == [0, 0, 1, 2, 2, 2, 4]


def test_an_image_smaller_than_the_crop_is_enlarged() -> None:
    assert resized_size(20, 33, 224) == (224, 369)
    assert multi_scale_views(20, 33)[0] == View(
        scale_px=224, resized_height=224, resized_width=369, top=0, left=72, mirrored=False
    )


def test_one_pixel_wide() -> None:
    assert resized_size(100, 1, 224) == (22400, 224)
    assert crop_offsets(22400, 224, 224, 5) == ((0, 0), (0, 0), (22176, 0), (22176, 0), (11088, 0))


def test_an_image_of_the_crops_size_has_all_windows_in_one_place() -> None:
    assert crop_offsets(224, 224, 224, 5) == ((0, 0),) * 5


@settings(deadline=None, max_examples=200)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), scale=st.integers(32, 700))
def test_every_view_lies_inside_the_resized_image(height: int, width: int, scale: int) -> None:
    for view in pass_views(Pass(kind="crops", scale_px=scale, views=10), height, width, 32):
        assert min(view.resized_height, view.resized_width) == scale
        assert 0 <= view.top <= view.resized_height - 32
        assert 0 <= view.left <= view.resized_width - 32


@pytest.mark.parametrize(("height", "width"), [(375, 500), (333, 500), (501, 377), (97, 231), (40, 40), (33, 400), (129, 64)])
@pytest.mark.parametrize("scale", [32, 37, 51, 60])
def test_sizes_and_windows_are_torchvisions(height: int, width: int, scale: int) -> None:
    image = torch.zeros(1, height, width)
    resized = torchvision_transforms.resize(image, [scale], antialias=False)
    size = resized_size(height, width, scale)
    assert size == tuple(resized.shape[1:])
    # Every pixel holds its own number, so that a crop tells where it was cut.
    numbers = torch.arange(size[0] * size[1]).reshape(1, *size)
    corners = [divmod(int(crop[0, 0, 0]), size[1]) for crop in torchvision_transforms.five_crop(numbers, [32, 32])]
    assert list(crop_offsets(*size, 32, 5)) == corners
    assert crop_offsets(*size, 32, 1) == (corners[4],)


def test_views_per_scale_can_be_chosen() -> None:
    plans = crops_passes((40, 50), 32, (1, 5))
    assert [(plan.views, plan.mirrored) for plan in plans] == [(1, False), (5, False)]
    assert len(pass_views(plans[1], 60, 80, 32)) == 5


def test_whole_images_have_one_view_or_two() -> None:
    assert [plan.views for plan in whole_passes((224, 640), mirror=True)] == [2, 2]
    assert [plan.views for plan in whole_passes((224, 640), mirror=False)] == [1, 1]
    assert len({plan.name for plan in (*crops_passes(), *whole_passes())}) == 10


@pytest.mark.parametrize(
    ("scales", "views", "message"),
    [
        ((200, 256), None, "scale 200 is smaller than the crop of 224 pixels, and images are never padded"),
        ((256, 224), None, r"scales must be increasing, each once, got \[256, 224\]"),
        ((), None, "scales must be increasing"),
        ((224, 256), (2,), "1 counts were given for 2 scales"),
        ((224, 256), (2, 7), "7 at scale 256; allowed are 1, 2, 5 and 10"),
    ],
)
def test_impossible_scales_are_refused(scales: tuple[int, ...], views: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        crops_passes(scales, 224, views)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="0x5 pixels has no size"):
        resized_size(0, 5, 224)
