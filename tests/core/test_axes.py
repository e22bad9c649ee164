import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import axes

SIZES = {"D": 6, "N": 2, "H": 5, "F": 7, "E": 4, "Q": 3, "Y": 8}


@st.composite
def layouts(draw) -> str:
    """Two bracketings of two orders of the same axes, one of them perhaps a 3."""
    letters = draw(st.lists(st.sampled_from("DNHFEQY2"), min_size=1, unique=True))

    def side() -> str:
        order, word = draw(st.permutations(letters)), ""
        while order:
            size = draw(st.integers(1, len(order)))
            group, order = "".join(order[:size]), order[size:]
            word += group if size == 1 else f"({group})"
        return word

    return f"{side()} -> {side()}"


@given(layouts())
def test_the_inverse_undoes_a_layout(layout):
    source, target = layout.split(" -> ")
    shape = axes.shape(source, SIZES)
    x = np.arange(np.prod(shape)).reshape(shape)
    y = axes.relayout(x, layout, SIZES)
    assert y.shape == axes.shape(target, SIZES)
    np.testing.assert_array_equal(axes.relayout(y, axes.inverse(layout), SIZES), x)
    assert axes.inverse(axes.inverse(layout)) == layout


@given(layouts())
def test_a_layout_moves_each_number_to_the_place_its_axes_say(layout):
    """Each entry is the sum of what its axes' indices weigh, so its value says where it belongs."""
    weights = {letter: 10**place for place, letter in enumerate("DNHFEQY2")}

    def labelled(word: str) -> np.ndarray:
        total = np.zeros(())
        for axis in word.replace("(", "").replace(")", ""):
            length = int(axis) if axis.isdigit() else SIZES[axis]
            total = total[..., None] + weights[axis] * np.arange(length)
        return total.reshape(axes.shape(word, SIZES))

    source, target = layout.split(" -> ")
    found = axes.relayout(labelled(source), layout, SIZES)
    np.testing.assert_array_equal(found, labelled(target))


def test_a_rearrangement_without_a_transpose_is_a_view():
    x = np.zeros((6, 30))
    assert np.shares_memory(axes.relayout(x, "D(3NH) -> D3NH", SIZES), x)


def test_an_array_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"takes shape \(6, 30\), found \(30, 6\)"):
        axes.relayout(np.zeros((30, 6)), "D(3NH) -> D3NH", SIZES)


@pytest.mark.parametrize("layout", ["DN", "DN -> D", "DN->ND", "D -> DD"])
def test_sides_with_different_axes_are_refused(layout):
    with pytest.raises(ValueError, match="the same axes on both sides"):
        axes.inverse(layout)


@pytest.mark.parametrize("word", ["Dx", "D-", "d"])
def test_a_letter_that_is_no_axis_is_refused(word):
    with pytest.raises(ValueError, match=r"is no axis; see core\.axes"):
        axes.shape(word, SIZES)
