import pytest
import torch
from plain_loop import adafactor, adam, adamw, adamw_fused, rmsprop, sgd, train
from tiny_families import make_family
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from toy_models import loss_of, make_gpt2, token_batches
from transformers import MixtralConfig, MixtralForCausalLM

from hf_topkast import TopKastConfig, TopKastController, sparsify
from hf_topkast.storage import Arriving, Pattern, distributed
from hf_topkast.surgery import sparse_layers


@pytest.mark.parametrize(("family", "matrices"), [("gpt2", 1), ("mixtral", 4)])
def test_one_reservoir_is_on_its_way_while_a_matrix_is_refreshed(family, matrices, monkeypatch):
    notes = []

    class Noted(Arriving):
        def __init__(self, resting, device):
            super().__init__(resting, device)
            self.name = names[resting.untyped_storage().data_ptr()], resting.storage_offset()
            notes.append(("leaves", self.name))

        def here(self):
            notes.append(("arrives", self.name))
            return super().here()

    model = make_gpt2() if family == "gpt2" else make_family(family)
    model = sparsify(model, density=0.2, refresh_every=1, reservoir_device="cpu")
    names = {layer.reservoir.data_ptr(): name for name, layer in sparse_layers(model)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TopKastController(model, optimizer)
    monkeypatch.setattr("hf_topkast.training.reassignment.Arriving", Noted)
    order = []
    for name, layer in sparse_layers(model):
        starts = [sum(map(len, list(layer.rests())[:place])) for place in range(layer.matrices)]
        order += [(name, start) for start in starts]
    assert len(order) == len(names) + (matrices - 1) * sum("experts" in name for name in names.values())
    loss_of(model, token_batches(1)[0]).backward()
    optimizer.step()
    expected = [("leaves", order[0])]
    for name, following in zip(order, [*order[1:], None]):
        expected += [("leaves", following)] if following else []
        expected.append(("arrives", name))
    assert notes == expected


@pytest.mark.parametrize(("method", "asked"), [("topkast", 0), ("set", 1), ("magnitude_pruning", 1)])
@pytest.mark.parametrize("split_fused", [False, True])
def test_masks_of_the_former_sets_are_made_for_methods_that_ask(method, asked, split_fused, monkeypatch):
    model = sparsify(make_gpt2(), density=0.2, method=method, split_fused=split_fused)
    controller = TopKastController(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
    made = []
    for name in ("active_mask", "backward_mask"):
        make = getattr(Pattern, name)
        monkeypatch.setattr(Pattern, name, lambda pattern, make=make: made.append(1) or make(pattern))
    controller.refresh()
    assert len(made) == asked * len(list(sparse_layers(model)))  # once each, however many parts a layer has


class Living(TorchDispatchMode):
    """The most bytes at once of the tensors that were made inside."""

    def __init__(self):
        super().__init__()
        self.most, self._made = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in args if isinstance(each, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: each for key, each in self._made.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result


@pytest.mark.parametrize(("method", "place"), [("topkast", "same"), ("topkast", "disk"), ("set", "same")])
def test_a_refresh_takes_the_memory_of_one_expert(method, place, monkeypatch):
    monkeypatch.setattr(distributed, "SLOTS_AT_ONCE", 2**10)
    sizes = {"hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 48}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}

    def most(experts):
        """The most bytes at once of a refresh."""
        config = MixtralConfig(**sizes, **heads, num_local_experts=experts, num_experts_per_tok=2)
        settings = {"density": 0.2, "method": method, "reservoir_device": place}
        model = sparsify(MixtralForCausalLM(config), target_modules=["experts.gate_up_proj"], **settings)
        ((_, layer),) = sparse_layers(model)
        optimizer = torch.optim.AdamW([layer.values])
        controller = TopKastController(model, optimizer, total_steps=10)
        layer.values.grad = torch.rand_like(layer.values)
        optimizer.step()
        before = layer.pattern.active_mask()
        with Living() as living:
            controller.refresh()
        assert not torch.equal(layer.pattern.active_mask(), before)
        return living.most

    assert most(32) < 1.1 * most(8)


def snapshot(controller):
    """θ and every moment as dense tensors, so that a weight keeps its place."""
    result = {}
    for name, layer in controller.layers.items():
        dense = {"theta": layer.theta().flatten(), "stored": layer.pattern.backward_mask().flatten()}
        for key, moment in controller.optimizer.state[layer.values].items():
            if torch.is_tensor(moment) and moment.ndim:
                dense[key] = torch.full((layer.numel,), float("nan"), dtype=moment.dtype)
                dense[key][layer.pattern.flat_index()] = moment
        result[name] = dense
    return result


@pytest.mark.parametrize("make_optimizer", [sgd, adam, adamw_fused, rmsprop, adafactor])
@pytest.mark.parametrize("new_state", ["zero", "mean"])
def test_refresh_moves_state_with_its_weight(make_model, make_optimizer, new_state):
    config = TopKastConfig(density=0.2, refresh_every=1000, new_state=new_state)
    model = sparsify(make_model(), config)
    _, controller = train(model, config, make_optimizer, [[tokens] for tokens in token_batches(4)])
    with torch.no_grad():  # so that many weights change sets
        for layer in controller.layers.values():
            layer.values[::3] *= 0.01
    before = snapshot(controller)
    means = {
        (name, key): moment.mean()
        for name, layer in controller.layers.items()
        for key, moment in controller.optimizer.state[layer.values].items()
        if torch.is_tensor(moment) and moment.ndim
    }
    controller.refresh()
    after = snapshot(controller)
    assert controller.mask_churn > 0.1
    for name in before:
        stored, was_stored = after[name].pop("stored"), before[name].pop("stored")
        assert torch.equal(after[name].pop("theta"), before[name].pop("theta"))
        assert (stored & ~was_stored).any() and (was_stored & ~stored).any()
        for key, moment in after[name].items():
            assert torch.equal(moment[stored & was_stored], before[name][key][stored & was_stored])
            second = key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance")
            fresh = means[name, key] if second and new_state == "mean" else 0.0
            assert (moment[stored & ~was_stored] == fresh).all()


def test_reservoir_is_untouched_between_refreshes(make_model):
    config = TopKastConfig(density=0.2, refresh_every=1000)
    model = sparsify(make_model(), config)
    before = {name: layer.reservoir.clone() for name, layer in sparse_layers(model)}
    train(model, config, adamw, [[tokens] for tokens in token_batches(5)])
    assert all(torch.equal(layer.reservoir, before[name]) for name, layer in sparse_layers(model))
