"""That the benchmark's numbers of an expert are those of its masks, and that it runs on what a training saves."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks import expert_load
from hf_topkast import TopKastController, sparsify


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=256, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1, **sizes)
    return sparsify(MixtralForCausalLM(config), density=0.25)


def test_load_and_sets_of_every_expert(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "early")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    controller = TopKastController(model, optimizer, total_steps=100)
    tokens = torch.randint(0, 256, (4, 8))
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    controller.refresh()
    model.save_pretrained(tmp_path / "late")
    text = bytes(tokens.flatten().tolist())
    (tmp_path / "text").write_bytes(text)

    early = type(model).from_pretrained(tmp_path / "early")
    rows = expert_load.measure(early, model, tokens)
    assert len(rows) == 2 * 4  # gate with up, and down
    for part in (rows[:4], rows[4:]):
        assert sum(row["load"] for row in part) == pytest.approx(4)
    name = rows[0]["layer"]
    old, new = (dict(which.named_modules())[name].active_mask[0] for which in (early, model))
    assert rows[0]["exchanged"] == pytest.approx(float((old & ~new).sum() / old.sum()))
    assert sum(row["exchanged"] for row in rows) > 0

    options = ["--bytes", "32", "--window", "8", "--json", str(tmp_path / "out.json")]
    expert_load.main([*(str(tmp_path / part) for part in ("early", "late", "text")), *options])
    assert len(capsys.readouterr().out.splitlines()) >= 5
