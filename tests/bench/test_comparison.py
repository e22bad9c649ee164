import math
import re

import pytest

from bench.comparison import agreement, judged, speedup, spread


def test_spread_is_the_median_the_quartiles_and_the_extremes():
    found = spread([5.0, 1.0, 4.0, 2.0, 30.0])
    assert (found.minimum, found.low, found.value, found.high, found.maximum) == (1, 2, 4, 5, 30)


def test_one_sample_is_its_own_spread():
    assert spread([3.0]).low == spread([3.0]).high == 3.0


def test_speedup_is_above_one_when_ours_takes_less_time():
    found = speedup([1.0, 1.0, 1.0], [2.0, 2.5, 2.2])
    assert found.value == pytest.approx(2.2)
    assert (found.minimum, found.maximum) == (2.0, 2.5)


def test_a_slow_minute_that_hits_both_does_not_widen_the_spread_of_the_ratio():
    found = speedup([1.0, 4.0, 1.0, 4.0], [2.0, 8.0, 2.0, 8.0])
    assert found.minimum == found.maximum == found.value == 2.0


def test_unequal_numbers_of_turns_cannot_be_paired():
    with pytest.raises(ValueError, match="zip"):
        speedup([1.0, 1.0], [1.0])


def test_agreement_reports_the_largest_difference():
    found = agreement({"logits": [1.0, 2.0]}, {"logits": [1.0, 2.0004]})
    assert not found.complaint
    assert found.difference == pytest.approx(4e-4)


@pytest.mark.parametrize(
    ("theirs", "complaint"),
    [
        ({"tokens": [[1, 2], [3, 5]]}, r"tokens\[3\] is 5 instead of 4"),
        ({"tokens": [[1, 2], [3]]}, "3 values instead of 4"),
        ({"logits": [1.0]}, "instead of"),
    ],
)
def test_a_different_token_shape_or_kind_is_a_complaint(theirs, complaint):
    found = agreement({"tokens": [[1, 2], [3, 4]]}, theirs)
    assert re.search(complaint, found.complaint)


@pytest.mark.parametrize("wrong", [1.002, math.nan, math.inf])
def test_floats_beyond_the_tolerance_and_nan_are_complaints(wrong):
    assert agreement({"logits": [1.0]}, {"logits": [wrong]}).complaint


def test_a_nan_of_our_own_is_a_complaint():
    assert agreement({"losses": [math.nan]}, {"losses": [math.nan]}).complaint


def test_narrow_numbers_are_compared_as_a_whole_and_not_one_by_one():
    ours, theirs = {"logits": [1.0, -2.0, 0.001]}, {"logits": [1.05, -2.0, 0.03]}
    assert agreement(ours, theirs).complaint
    found = agreement(ours, theirs, "bfloat16")
    assert not found.complaint
    assert found.difference == pytest.approx(math.hypot(0.05, 0.029) / math.hypot(1, 2), rel=1e-3)
    assert "off by" in agreement(ours, {"logits": [1.9, -2.0, 0.0]}, "bfloat16").complaint
    assert agreement(ours, {"logits": [math.nan, -2.0, 0.0]}, "int8").complaint


def test_only_what_both_have_is_compared():
    assert not agreement({"tokens": [[1]], "counts": [1]}, {"counts": [1]}).complaint
    assert agreement({"tokens": [[1]], "counts": [1]}, {"counts": [2]}).complaint
    assert agreement({"tokens": [[1]]}, {"logits": [1.0]}).difference == math.inf


def test_the_worst_token_decides():
    assert judged([0.0, 0.2], "bfloat16").difference == 0.2
    assert judged([0.0, 1.1, 0.0], "bfloat16").complaint
    assert judged([0.1, math.nan, 0.0], "bfloat16").complaint
