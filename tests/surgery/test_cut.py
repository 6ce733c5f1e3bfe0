"""What a pretrained model is told before it loses weights, and which models are refused."""

import pytest
from toy_models import make_gpt2, token_batches
from transformers import AutoModelForCausalLM

from hf_topkast import TopKastConfig, sparsify, sparsity_report


@pytest.fixture
def pretrained(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    return tmp_path


def warnings_of(caplog):
    return [record.message for record in caplog.records if "pretrained model" in record.message]


@pytest.fixture(autouse=True)
def messages(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("hf_topkast"), "propagate", True)


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"density": 0.2}, True),
        ({"density": 0.2, "method": "rigl"}, True),
        ({"density": 0.2, "initial_density": 1.0}, False),
        ({"density": 0.2, "calibration": token_batches(1)}, False),
        ({"density": 1.0}, False),
    ],
    ids=str,
)
def test_a_cut_at_once_is_said_of_pretrained_models_only(pretrained, caplog, settings, warns):
    sparsify(make_gpt2(), **settings)
    assert not warnings_of(caplog)
    sparsify(AutoModelForCausalLM.from_pretrained(pretrained), **settings)
    found = warnings_of(caplog)
    assert len(found) == warns
    if "method" in settings:
        assert "draws the first A at random" in found[0] and "calibration" not in found[0]
    elif warns:
        assert "density=0.2 takes 80%" in found[0] and "calibration=batches" in found[0]
        assert "initial_density=1.0" in found[0]


def test_a_model_of_another_quantizer_is_refused_and_stays_as_it_was():
    class OtherQuantizer:
        quantization_config = object()

    model = make_gpt2()
    model.hf_quantizer = OtherQuantizer()
    with pytest.raises(ValueError, match="GPT2LMHeadModel was loaded by OtherQuantizer.*plain copy"):
        sparsify(model, density=0.2)
    assert not sparsity_report(model).rows


def test_from_pretrained_with_settings_is_not_refused(pretrained):
    model = AutoModelForCausalLM.from_pretrained(pretrained, quantization_config=TopKastConfig(density=0.2))
    assert sparsity_report(model).rows
