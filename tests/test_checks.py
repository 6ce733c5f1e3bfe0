import math

import pytest

from hf_topkast.checks import check, check_regex, number, parsed, whole


@pytest.mark.parametrize("value", [0, -2, 3.5, math.inf])
def test_numbers_are_themselves(value):
    assert number(value) == value


@pytest.mark.parametrize("value", [True, "1", None, [1], math.nan])
def test_anything_else_lies_in_no_range(value):
    assert math.isnan(number(value)) and math.isnan(whole(value))


def test_whole_numbers():
    assert whole(4) == whole(4.0) == 4
    assert all(math.isnan(whole(value)) for value in (2.5, math.inf, -math.inf))


def test_text_that_cannot_be_parsed_is_left_for_the_check():
    assert parsed("0.5", float) == 0.5
    assert parsed("half", float) == "half"


def test_errors_name_the_setting_and_the_value():
    check(True, "density", 0.2, "anything")
    with pytest.raises(ValueError, match=r"density=2 is not allowed: it must be at most 1\."):
        check(False, "density", 2, "at most 1")
    check_regex("target_modules", "c_(fc|proj)")
    with pytest.raises(ValueError, match=r"target_modules='\(c' is not a regular expression"):
        check_regex("target_modules", "(c")
