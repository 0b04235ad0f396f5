import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

from evaluation.fully_convolutional import group_by_shape, order_by_shape, require_dense_classifier
from unitdist.errors import ConfigError

shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=40)


@given(shapes=shapes, budget=st.integers(0, 40))
def test_groups_hold_every_image_once_one_shape_and_the_budget(shapes: list[tuple[int, int]], budget: int) -> None:
    groups = group_by_shape(shapes, budget)
    assert sorted(position for group in groups for position in group) == list(range(len(shapes)))
    for group in groups:
        assert len({shapes[position] for position in group}) == 1
        height, width = shapes[group[0]]
        assert len(group) == 1 or len(group) * height * width <= budget


def test_groups_are_as_large_as_the_budget_allows() -> None:
    assert group_by_shape([(2, 3), (5, 5), (2, 3), (2, 3)], 12) == [[0, 2], [3], [1]]


@given(shapes=shapes)
def test_the_order_puts_equal_shapes_side_by_side(shapes: list[tuple[int, int]]) -> None:
    order = order_by_shape(shapes)
    assert sorted(order) == list(range(len(shapes)))
    assert [shapes[position] for position in order] == sorted(shapes)


def test_a_pool_onto_a_grid_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((7, 7)), nn.Flatten(), nn.Linear(196, 5))
    with pytest.raises(ConfigError, match=r"1 pools onto \(7, 7\); use --protocol crops"):
        require_dense_classifier(net)


def test_a_global_pool_is_accepted() -> None:
    require_dense_classifier(resnet18())
