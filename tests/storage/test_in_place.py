import pytest
import torch
from torch import nn

from hf_topkast.storage.in_place import rewrite


def make_module():
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3))
    module.register_buffer("numbers", torch.zeros(3, dtype=torch.int16))
    return module


@pytest.mark.parametrize("name", ["weight", "numbers"])
@pytest.mark.parametrize("size", [3, 5, 0])
@torch.no_grad()
def test_the_tensor_stays_the_same_object_of_its_dtype(name, size):
    module, new = make_module(), torch.arange(size, dtype=torch.int64)
    tensor = getattr(module, name)
    dtype, place = tensor.dtype, tensor.data_ptr()
    rewrite(module, name, new)
    assert getattr(module, name) is tensor and tensor.dtype == dtype
    assert tensor.tolist() == new.tolist()
    assert tensor.requires_grad == (name == "weight")
    assert size != 3 or tensor.data_ptr() == place


@pytest.mark.parametrize("size", [3, 5])
@torch.no_grad()
def test_the_numbers_are_a_copy(size):
    module, new = make_module(), torch.ones(size)
    rewrite(module, "weight", new)
    module.weight.zero_()
    assert new.all()


def test_an_optimizer_and_a_compiled_model_go_on_with_it():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self):
            return self.weight.square().sum()

    module = Squares()
    optimizer, compiled = torch.optim.SGD(module.parameters(), lr=0.25), torch.compile(module, backend="aot_eager")
    loss = compiled()
    loss.backward()
    optimizer.zero_grad()
    with torch.no_grad():
        rewrite(module, "weight", torch.full((5,), 2.0))  # with the loss still at hand
    compiled().backward()
    optimizer.step()
    assert module.weight.tolist() == [1.0] * 5


def test_what_is_written_in_inference_mode_can_be_trained():
    module = make_module()
    with torch.inference_mode():
        rewrite(module, "weight", torch.ones(5))
    (module.weight.square().sum()).backward()
    assert module.weight.grad.tolist() == [2.0] * 5
