import json
import re

import pytest
import torch
from tiny_families import make_family
from toy_models import make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify, sparsity_report


def test_totals_agree_with_the_model(make_model):
    dense = make_model()
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    report = sparsity_report(sparsify(dense, density=0.2))
    assert len(report.rows) in (8, 14)
    assert report.density == pytest.approx(0.2, abs=1e-3)
    assert report.backward_density == pytest.approx(0.4, abs=1e-3)
    assert report.total_parameters == parameters
    weights = sum(row.weights for row in report.rows)
    assert report.nonzero_parameters == pytest.approx(parameters - 0.8 * weights, rel=1e-3)
    assert report.dense_state_bytes == 4 * 4 * parameters


def test_a_reservoir_on_disk_takes_no_memory():
    same, disk = (
        sparsity_report(sparsify(make_gpt2(), density=0.2, reservoir_device=device)) for device in ("same", "disk")
    )
    reservoir = sum(4 * (row.weights - row.stored) for row in same.rows)
    assert same.trainable_state_bytes - disk.trainable_state_bytes == reservoir


def live_bytes(model, optimizer):
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_stated_bytes_are_the_live_ones(make_model, density):
    model = sparsify(make_model(), density=density, refresh_every=1)
    optimizer = torch.optim.AdamW(model.parameters())
    TopKastController(model, optimizer)
    before = {id(buffer) for buffer in model.buffers()}
    for tokens in token_batches(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        optimizer.step()
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]  # the last refresh dropped those of the values
    assert {id(buffer) for buffer in model.buffers()} == before
    outside = sum(
        buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name
    )  # rotary tables: no training state
    assert sparsity_report(model).trainable_state_bytes == live_bytes(model, optimizer) - outside


def test_stated_bytes_of_blocks_are_the_live_ones():
    model = torch.nn.Sequential(torch.nn.Linear(96, 64))
    sparsify(model, density=0.3, backward_density=0.5, block_size=16, target_modules=["0"])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 96)).sum().backward()
    optimizer.step()
    assert model[0].column_walk is not None
    assert sparsity_report(model).trainable_state_bytes == live_bytes(model, optimizer)


def test_dense_model():
    report = sparsity_report(make_gpt2())
    assert report.rows == [] and report.density == report.backward_density == 1.0
    assert report.trainable_state_bytes == report.dense_state_bytes


def test_prints_a_table_and_gives_json():
    report = sparsity_report(sparsify(make_gpt2(), density=0.2))
    text = str(report)
    assert "transformer.h.1.mlp.c_proj" in text and "24 × 96" in text
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["density"] == report.density
    assert stored["rows"][0]["name"] == "transformer.h.0.attn.c_attn"


def test_markdown():
    text = sparsity_report(sparsify(make_gpt2(), density=0.2)).to_markdown()
    assert "| `transformer.h.1.mlp.c_proj` | 24 × 96 | 0.2001 | 0.4002 |" in text
    assert text.splitlines()[-1].startswith("| all sparse layers | | 0.2")


def test_experts():
    report = sparsity_report(sparsify(make_family("mixtral"), density=0.25))
    row = next(row for row in report.rows if row.name == "model.layers.1.mlp.experts.gate_up_proj")
    assert (row.experts, row.shape, row.weights) == (4, (96, 32), 4 * 96 * 32)
    assert (row.active, row.stored) == (4 * 96 * 8, 4 * 96 * 16)
    assert re.search(r"model\.layers\.1\.mlp\.experts\.gate_up_proj +4 × \(96 × 32\) +12,288 ", str(report))
    assert "| `model.layers.1.mlp.experts.gate_up_proj` | 4 × (96 × 32) | 0.2500 | 0.5000 |" in report.to_markdown()
    rows = {row["name"]: row["experts"] for row in json.loads(json.dumps(report.to_dict()))["rows"]}
    assert rows[row.name] == 4 and rows["model.layers.1.self_attn.q_proj"] is None
    assert report.total_parameters == sum(parameter.numel() for parameter in make_family("mixtral").parameters())


def test_live_bytes_of_experts():
    model = sparsify(make_family("mixtral"), density=0.2, refresh_every=2)
    optimizer = torch.optim.Adam(model.parameters())
    model(input_ids=torch.arange(12).view(1, 12)).logits.square().sum().backward()
    optimizer.step()
    frequencies = sum(buffer.nbytes for buffer in model.model.rotary_emb.buffers())
    assert sparsity_report(model).trainable_state_bytes == live_bytes(model, optimizer) - frequencies
