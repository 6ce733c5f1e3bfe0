import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from toy_models import make_gpt2

from hf_topkast import TopKastController, sparsify


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp_1_is_refused(alone):
    model = FullyShardedDataParallel(sparsify(make_gpt2(), density=0.2), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="FSDP 1 flattens.*Use FSDP2"):
        TopKastController(model, sgd(model))


class Engine(nn.Module):
    """As DeepSpeed wraps a model."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module):
        super().__init__()
        self.module = module


class ShardedSGD(torch.optim.SGD):
    """As DeepSpeed wraps an optimizer."""

    __module__ = "deepspeed.runtime.zero.stage_1_and_2"


def test_deepspeed_is_refused():
    model = sparsify(make_gpt2(), density=0.2)
    with pytest.raises(ValueError, match="DeepSpeed keeps.*Use FSDP2"):
        TopKastController(Engine(model), sgd(model))
    with pytest.raises(ValueError, match="DeepSpeed keeps.*Use FSDP2"):
        TopKastController(model, ShardedSGD(model.parameters(), lr=0.1))
