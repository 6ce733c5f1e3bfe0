import pytest

from hf_topkast.sets.methods import METHODS, get_method


def test_unknown_method_is_refused():
    assert get_method("topkast") is METHODS["topkast"]
    with pytest.raises(ValueError, match="method='lottery'.*static.*topkast"):
        get_method("lottery")


def test_only_static_never_chooses_again():
    assert [name for name, method in METHODS.items() if not method.refreshes] == ["static"]
