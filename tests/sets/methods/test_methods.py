import pytest

from hf_topkast.method import METHODS, get_method


def test_unknown_method_is_refused():
    assert get_method("topkast") is METHODS["topkast"]
    with pytest.raises(ValueError, match="method='lottery'.*static.*topkast"):
        get_method("lottery")


def test_only_static_methods_never_choose_again():
    assert [name for name, method in METHODS.items() if not method.refreshes] == ["static", "static_random"]
