import copy
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from hf_topkast.layers.readonly import ReadOnlyTensor


def make_tensor():
    return torch.arange(6.0).view(2, 3).as_subclass(ReadOnlyTensor)


def add_in_place(x):
    x += 1


def add_to_data(x):
    x.data += 1


def replace_data(x):
    x.data = torch.zeros(2, 3)


def assign(x):
    x[0, 0] = 1.0


WRITES = {
    "method": lambda x: x.zero_(),
    "operator": add_in_place,
    "data": add_to_data,
    "replaced data": replace_data,
    "item": assign,
    "out": lambda x: torch.add(x, x, out=x),
    "init": nn.init.normal_,
    "init of a distribution": nn.init.kaiming_uniform_,
    "view": lambda x: x.view(-1).zero_(),
    "transposed view": lambda x: assign(x.T),
    "detached": lambda x: x.detach().zero_(),
    "parameter": nn.Parameter,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_writes_are_refused(write):
    tensor = make_tensor()
    with pytest.raises(RuntimeError, match="dense copy of its values"):
        write(tensor)
    assert torch.equal(tensor, torch.arange(6.0).view(2, 3))


COPIES = {
    "clone": lambda x: x.clone(),
    "product": lambda x: x * 1,
    "dtype": lambda x: x.double().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "safetensors": lambda x: load(save({"x": x}))["x"],
    "written into another": lambda x: torch.empty(2, 3).copy_(x),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=list(COPIES))
def test_what_is_computed_from_it_is_ordinary(make_copy):
    result = make_copy(make_tensor())
    assert type(result) is Tensor
    assert torch.equal(result, make_tensor())
    result.zero_()


def test_it_can_be_read():
    tensor = make_tensor()
    assert (tensor.shape, tensor.dtype, tensor[1, 2].item(), len(tensor)) == ((2, 3), torch.float32, 5.0, 2)
    x = torch.ones(4, 3, requires_grad=True)
    nn.functional.linear(x, tensor).sum().backward()
    assert torch.equal(x.grad, torch.tensor([3.0, 5.0, 7.0]).expand(4, 3))


def test_on_the_meta_device():
    tensor = torch.empty(2, 3, device="meta").as_subclass(ReadOnlyTensor)
    assert type(tensor.clone()) is Tensor and type(tensor.T) is ReadOnlyTensor
