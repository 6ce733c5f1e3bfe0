import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_topkast.runs import Run, write_page
from hf_topkast.runs.page import named_apart, page
from hf_topkast.runs.table import NOTHING, cost_rows, outcome_rows, setting_rows, version_rows


RESULTS = {
    "valid_bits_per_byte": 2.5,
    "test_bits_per_byte": 2.25,
    "nonzero_parameters": 400,
    "parameters": 1000,
    "tokens": 100,
    "steps": 10,
    "train_seconds": 60,
    "state_bytes": 2**20,
    "peak_state_bytes": 2**21,
    "dense_state_bytes": 2**22,
    "training_flops": 3,
    "dense_training_flops": 12,
    "device": "CPU",
    "versions": {"torch": "2.13"},
    "git_commit": None,
    "command": ["my.yaml", "--note", "<b>"],
}


def make(name, sparse, **results):
    shares = {"topkast/density": 0.2, "topkast/backward_density": 0.4, "topkast/mask_churn": 0.1} if sparse else {}
    history = [{"step": step, "loss": 3.0 - step / 10, **shares} for step in range(1, 6)]
    layers = [{"step": step, "layers": {"h.0": {"density": 0.2, "churn": step / 10}}} for step in (0, 3)]
    settings = {"density": 0.2, "seed": 0, "density_overrides": {}} if sparse else {}
    return Run(name, Path(name), history, RESULTS | results, settings, layers if sparse else [])


@pytest.fixture
def runs():
    return [
        make("dense", False, train_seconds=120, state_bytes=2**22, peak_state_bytes=2**22),
        make("<sparse>", True, density=0.2),
    ]


def test_outcomes(runs):
    rows = dict(outcome_rows(runs))
    assert rows["bits per byte, valid"] == ["2.5000", "2.5000"] and "bits per byte, eval" not in rows
    assert rows["density"] == ["1.0000", "0.2000"] and rows["churn, last"] == [NOTHING, "0.1000"]
    assert "perplexity per word, test" not in rows


def test_costs_are_told_beside_dense(runs):
    rows = dict(cost_rows(runs))
    assert rows["speed, over dense"] == ["1.00×", "2.00×"]
    assert rows["memory, over dense"] == ["1.00", "0.50"] and rows["training FLOPs, over dense"][1] == "0.25"
    assert rows["training time"] == ["0:02:00", "0:01:00"] and rows["training state, at most"][1] == "2.0 MiB"


def test_times_of_other_machines_are_not_compared(runs):
    runs[1].results["device"] = "GPU"
    assert dict(cost_rows(runs))["speed, over dense"] == ["1.00×", NOTHING]
    assert "speed, over dense" not in dict(cost_rows(runs[1:]))


def test_settings_and_versions(runs):
    assert dict(setting_rows(runs))["density"] == [NOTHING, "0.2"]
    assert "density_overrides" not in dict(setting_rows(runs))
    assert dict(version_rows(runs)) == {"torch": ["2.13", "2.13"]}


class Checked(HTMLParser):
    """Whether every element is closed, and what the page asks for from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "line", "polyline", "rect", "image", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(runs, tmp_path):
    write_page(runs, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    checked = Checked()
    checked.feed(text)
    assert checked.open == []
    assert checked.links and all(link.startswith("data:") for link in checked.links)
    assert not re.search(r"https?://|@import|<script|url\((?!#)", text)
    assert "&lt;sparse&gt;" in text and "<sparse>" not in text and "&lt;b&gt;" in text
    for heading in ("What came out", "Over the steps", "Layer by layer", "Time and memory", "Settings", "Commands"):
        assert f"<h2>{heading}</h2>" in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_curves_of_all_runs_and_maps_of_those_with_layers(runs):
    text = page(runs)
    assert text.count("Churn by layer") == 2  # the heading and the label of the picture
    assert re.findall(r"<h3>([^<:,]+)", text)[:2] == ["Loss", "Churn"]


def test_runs_of_one_name_are_told_apart():
    pair = [Run("out", Path(place), []) for place in ("a/out", "b/out")]
    assert [run.name for run in named_apart(pair)] == ["a/out", "b/out"]
    assert page([Run("empty", Path("empty"), [])])
