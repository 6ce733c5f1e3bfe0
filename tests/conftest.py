"""What all tests share: no network, quiet logs, a cache of their own, and the fixtures."""

import gc
import os
import sys
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported anywhere
if "PYTEST_XDIST_WORKER" not in os.environ:  # those share it
    CACHE = tempfile.TemporaryDirectory(prefix="hf_topkast_tests_")
    os.environ["HF_HOME"] = CACHE.name  # crossovers that were measured on this machine are not to count
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that threads only wait for each other

from pathlib import Path

import pytest
import torch


if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before Triton is imported anywhere: it interprets its kernels then

from toy_models import MAKERS
from transformers.utils import logging


IMPORTED = pytest.StashKey[int]()

logging.set_verbosity_error()
logging.disable_progress_bar()


def pytest_runtest_setup(item):
    """Each `Trainer.train()` has Python look for garbage, among all that imports have left: that is none."""
    if item.config.stash.get(IMPORTED, 0) != len(sys.modules):
        item.config.stash[IMPORTED] = len(sys.modules)
        gc.freeze()


@pytest.fixture(params=sorted(MAKERS))
def make_model(request):
    """Makes a small model, once for each kind of layer."""
    return MAKERS[request.param]


@pytest.fixture
def threads():
    """Sets torch's number of threads, for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data beside the project; skips the test where there is none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared data beside the project")
    return folder
