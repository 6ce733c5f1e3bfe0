import pytest
import torch
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.storage import Arriving, Pattern
from hf_topkast.surgery import sparse_layers


def test_one_reservoir_is_on_its_way_while_a_layer_is_refreshed(monkeypatch):
    notes = []

    class Noted(Arriving):
        def __init__(self, resting, device):
            super().__init__(resting, device)
            self.name = names[id(resting)]
            notes.append(("leaves", self.name))

        def here(self):
            notes.append(("arrives", self.name))
            return super().here()

    model = sparsify(make_gpt2(), density=0.2, refresh_every=1, reservoir_device="cpu")
    names = {id(layer.reservoir): name for name, layer in sparse_layers(model)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TopKastController(model, optimizer)
    monkeypatch.setattr("hf_topkast.training.reassignment.Arriving", Noted)
    loss_of(model, token_batches(1)[0]).backward()
    optimizer.step()
    order = [name for name, _ in sparse_layers(model)]
    expected = [("leaves", order[0])]
    for name, following in zip(order, [*order[1:], None]):
        expected += [("leaves", following)] if following else []
        expected.append(("arrives", name))
    assert notes == expected


@pytest.mark.parametrize(("method", "asked"), [("topkast", 0), ("set", 1), ("magnitude_pruning", 2)])
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
