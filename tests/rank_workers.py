"""What one rank of a run of several processes does; `ranks.launch` starts it."""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from rank_loops import RESIZING, plain_loops, sgd, step, whole  # noqa: F401 - `plain_loops` by its name, below
from ranks import FSDP
from tiny_families import make_family
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy_models import loss_of, make_gpt2, token_batches
from toy_training import make_trainer
from transformers import TrainerCallback

from benchmarks.scaling import live_bytes
from hf_topkast import TopKastConfig, TopKastController, TopKastTrainer, sparsify
from hf_topkast.storage.distributed import SHARDS_INTEGERS, is_sharded, local
from hf_topkast.surgery import sparse_layers


def train(
    directory: str,
    resume=None,
    config: dict | None = None,
    weights: int = 0,
    die_at: int | None = None,
    diverge_at: int | None = None,
    **settings,
):
    """Trains a tiny GPT-2 with `TopKastTrainer`; rank 0 writes θ, sets, dense weights, metrics to `report.pt`."""
    common = {"density": 0.2, "refresh_every": 3, "penalty": 1e-3, "exploration_lr_scale": 0.5, "new_state": "mean"}
    config = TopKastConfig(**{**common, **(config or {})})
    sharded = FSDP.keys() <= os.environ.keys()
    if sharded:
        pass_for_gpus()
    trainer = make_trainer(directory, lambda: make_gpt2(weights), config=config, use_cpu=False, **settings)
    if die_at is not None and trainer.args.process_index == 1:
        trainer.add_callback(Die(die_at))
    if diverge_at is not None and trainer.args.process_index == 1:
        trainer.add_callback(Diverge(diverge_at))
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.is_fsdp_enabled == sharded
    if sharded:
        for _, layer in sparse_layers(trainer.model):
            assert all(map(is_sharded, (layer.values, layer.reservoir, layer.unvisited)))
            assert is_sharded(layer.columns) == SHARDS_INTEGERS
    state = whole(trainer.accelerator.unwrap_model(trainer.model))
    if trainer.is_world_process_zero():
        state["ranks"] = torch.tensor(trainer.args.world_size)
        logs = [log for log in trainer.state.log_history if "topkast/penalty" in log][-1]
        names = ("penalty", "reservoir_use", "mask_churn")
        state["metrics"] = torch.tensor([logs[f"topkast/{name}"] for name in names])
        torch.save(state, Path(directory) / "report.pt")


class Plain(torch.nn.Module):
    """A model that is none of transformers."""

    def __init__(self):
        super().__init__()
        self.inner = make_gpt2()

    def forward(self, input_ids, labels):
        return self.inner(input_ids=input_ids, labels=labels)


def refused_by_trainer(directory: str, plain: bool = False, **config):
    """Each rank writes why `TopKastTrainer` refuses these settings."""
    pass_for_gpus()
    config = TopKastConfig(density=0.2, **({"target_modules": ["c_fc", "c_proj"]} if plain else {}), **config)
    try:
        kind = Plain if plain else make_gpt2
        make_trainer(directory, make_model=kind, config=config, use_cpu=False, save_strategy="steps")
    except ValueError as error:
        Path(directory, f"refusal-{os.environ['RANK']}.txt").write_text(str(error))


def distil(directory: str, **settings):
    """As `train`, of a student on rows of different lengths; rank 0 writes what it has and logged to `report.pt`."""
    from test_distillation import losses, make_distillation  # (which imports `ranks`)

    sharded = FSDP.keys() <= os.environ.keys()
    if sharded:
        pass_for_gpus()
    trainer = make_distillation(directory, use_cpu=False, max_steps=4, optim="sgd", learning_rate=0.1, **settings)
    trainer.train()
    assert trainer.is_fsdp_enabled == sharded
    assert not any(is_sharded(parameter) for parameter in trainer.teacher.parameters())
    state = whole(trainer.accelerator.unwrap_model(trainer.model))
    if trainer.is_world_process_zero():
        state["ranks"] = torch.tensor(trainer.args.world_size)
        parts = [logs[f"distill/{part}"] for logs in losses(trainer) for part in ("task", "logits", "hidden")]
        state["parts"] = torch.tensor(parts)
        torch.save(state, Path(directory) / "report.pt")


def adapt(directory: str, own: bool, **settings):
    """Trains an adapter, around a sparse model or in it; every rank writes what it has to a file."""
    from test_peft import lora_trainer  # (which imports `ranks`)

    kind = lora_trainer(TopKastTrainer, make_gpt2, own)
    trainer = make_trainer(directory, kind=kind, use_cpu=False, max_steps=4, learning_rate=0.1, **settings)
    before = {name: layer.theta() for name, layer in sparse_layers(trainer.model)}
    trainer.train()
    for name, layer in sparse_layers(trainer.model):
        assert torch.equal(layer.theta(), before[name])
    adapters = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    adapters["ranks"] = torch.tensor(trainer.args.world_size)
    torch.save(adapters, Path(directory, f"adapter-{trainer.args.process_index}.pt"))


def pass_for_gpus():
    """Lets Accelerate use FSDP2 on CPUs, which torch can do and Accelerate does not offer: it silently takes DDP."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


class Die(TrainerCallback):
    """Ends this process in the middle of a training."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Diverge(Die):
    """Loses a number of this process's part of a layer."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            local(next(sparse_layers(model))[1].values.data)[0] = torch.nan


def fully_sharded(directory: str):
    """Loops of one's own under FSDP2; each rank writes what it found to `facts-RANK.json`."""
    dist.init_process_group("gloo")
    facts = {
        "dense": sharded_bytes(),
        "sparse": sharded_bytes(density=0.2),
        "on disk": sharded_bytes(density=0.2, reservoir_device="disk"),
    }
    for name, value in (("refresh_lag", 1),):
        try:
            sharded_bytes(density=0.2, **{name: value})
        except ValueError as error:
            facts[name] = str(error)
    facts["walks"] = sharded_walks()
    Path(directory, f"facts-{dist.get_rank()}.json").write_text(json.dumps(facts))


def sizes_change_sharded(directory: str):
    """Loops of one's own under FSDP2 whose sparse parameters become smaller; every rank saves where they led."""
    dist.init_process_group("gloo")
    for name, config in {**RESIZING, "on disk": {**RESIZING["scheduled"], "reservoir_device": "disk"}}.items():
        if "refresh_lag" in config:
            continue  # which FSDP2 cannot do
        model = sparsify(make_gpt2(dtype=torch.float64), **{"density": 0.2, "refresh_every": 2, **config})
        layers = [layer for _, layer in sparse_layers(model)]
        for layer in layers:
            layer.offer_columns()
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        TopKastController(model, optimizer)
        held = [(id(layer.values), layer.values.numel()) for layer in layers]
        for tokens in token_batches(6):
            loss_of(model, tokens[:2].chunk(2)[dist.get_rank()]).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert [id(layer.values) for layer in layers] == [place for place, _ in held]
        assert any(layer.values.numel() != size for layer, (_, size) in zip(layers, held))
        for layer in layers:
            whole_size, own = layer.values.numel(), local(layer.values).numel()
            assert own in (whole_size // 2, -(-whole_size // 2))
            moments = [state for state in optimizer.state[layer.values].values() if state.ndim]
            assert all(state.shape == layer.values.shape for state in moments)
            assert local(layer.reservoir).numel() <= -(-(layer.numel - whole_size) // 2)
        torch.save(whole(model), Path(directory, f"{name}-{dist.get_rank()}.pt"))


def sharded_walks() -> list[bool]:
    """Whether the walk by columns is that of the sets after a refresh; none is handed out after one rank's load."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64))
    sparsify(model, density=0.3, backward_density=0.5, refresh_every=1, block_size=16, target_modules=["0"])
    layer = model[0]
    layer.offer_columns()
    fully_shard(model)
    optimizer = torch.optim.SGD([layer.values, layer.bias], lr=0.5)
    TopKastController(model, optimizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    former = layer.column_walk.clone()
    torch.manual_seed(dist.get_rank())
    (model(torch.randn(8, 96)) - 1).square().sum().backward()
    optimizer.step()
    pattern = layer.pattern
    facts = [torch.equal(pattern.column_walk, pattern.walk_by_columns()), not torch.equal(pattern.column_walk, former)]
    if dist.get_rank() == 0:  # another one may have refused its state, and must not be waited for
        model.load_state_dict(before)
    return [*facts, (layer.pattern.column_walk is None) == (dist.get_rank() == 0)]


def sharded_bytes(**config) -> int:
    """Bytes that one rank holds after two steps with a refresh."""
    model = make_gpt2()
    if config:
        for _, layer in sparse_layers(sparsify(model, refresh_every=2, **config)):
            layer.offer_columns()
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad])
    if config:
        TopKastController(model, optimizer)
    for tokens in token_batches(2):
        step(model, optimizer, tokens)
    model(input_ids=token_batches(1)[0]).logits.sum().backward()
    return live_bytes(model, optimizer)


def by_methods(directory: str, configs: dict[str, dict], sharded: bool, skips: bool = False, micro_batches: int = 1):
    """
    Trains by each configuration on this rank's part of the batches; every rank writes what it has to a file. Where a
    model's weights are scored by their inputs, all ranks calibrate it alike. With `skips`, steps are given up in
    between, as a gradient scaler does.
    """
    dist.init_process_group("gloo")
    for name, config in configs.items():
        calibration = token_batches(2, seed=5) if config.get("score") == "activation" else None
        model = sparsify(make_gpt2(dtype=torch.float64), **config, calibration=calibration)
        bare = model
        if sharded:
            for _, layer in sparse_layers(model):
                layer.offer_columns()
            for block in model.transformer.h:
                fully_shard(block)
            fully_shard(model)
        else:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        TopKastController(model, optimizer, total_steps=8)
        batches = token_batches(8 * micro_batches)
        for first in range(0, len(batches), micro_batches):
            for tokens in (batches[0],) if skips else ():
                loss_of(model, tokens[:2].chunk(2)[dist.get_rank()]).backward()
                optimizer.zero_grad()
            for tokens in batches[first : first + micro_batches]:
                (loss_of(model, tokens[:2].chunk(2)[dist.get_rank()]) / micro_batches).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.save(whole(bare), Path(directory, f"{name}-{dist.get_rank()}.pt"))


def experts_by_methods(directory: str, family: str, configs: dict[str, dict], sharded: bool):
    """
    As `by_methods`, of a mixture-of-experts model; each rank writes what it has, and how many experts were without a
    token in how many passes. Rank 1 has sequences of one token only, which few experts get.
    """
    dist.init_process_group("gloo")
    for name, config in configs.items():
        model = expert_model(family, config)
        bare, idle = model, []
        for _, layer in sparse_layers(model):
            if hasattr(layer, "experts"):
                layer.register_forward_hook(
                    lambda module, args, y, idle=idle: idle.append(
                        int((args[1].diff(prepend=args[1].new_zeros(1)) == 0).sum())
                    )
                )
        if sharded:
            for _, layer in sparse_layers(model):
                layer.offer_columns()
            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model)
        else:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        TopKastController(model, optimizer, total_steps=6)
        for tokens in expert_batches():
            loss_of(model, tokens.chunk(2)[dist.get_rank()]).backward()
            optimizer.step()
            optimizer.zero_grad()
        state = whole(bare)
        state["idle"] = torch.tensor(idle)
        torch.save(state, Path(directory, f"{name}-{dist.get_rank()}.pt"))


def expert_model(family: str, config: dict) -> torch.nn.Module:
    """A sparse model in float64."""
    calibration = expert_batches(seed=5) if config.get("score") == "activation" else None
    return sparsify(make_family(family).double().train(), **config, calibration=calibration)


def expert_batches(seed: int = 0) -> list[torch.Tensor]:
    """Batches of which the second half has one token only, over and over."""
    batches = [tokens[:2] + 2 for tokens in token_batches(6, seed=seed)]
    for tokens in batches:
        tokens[1] = tokens[1, :1]
    return batches


def prepared_by_accelerate(directory: str):
    """A loop of one's own under Accelerate's FSDP2; rank 0 saves where it led."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # as docs/scaling.md says
    pass_for_gpus()
    accelerator = Accelerator()
    model = sparsify(make_gpt2(), density=0.2, refresh_every=2)
    for _, layer in sparse_layers(model):
        layer.offer_columns()
    model, optimizer = accelerator.prepare(model, sgd(model))
    TopKastController(model, optimizer)
    assert all(is_sharded(layer.values) for _, layer in sparse_layers(model))
    for tokens in token_batches(6):
        accelerator.backward(loss_of(model, tokens))
        optimizer.step()
        optimizer.zero_grad()
    state = whole(model)
    if accelerator.is_main_process:
        torch.save(state, Path(directory) / "report.pt")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200)  # where it hangs, should it hang
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    if dist.is_initialized():
        dist.destroy_process_group()
    # Without leaving the interpreter: a thread of gloo that drops a hook of ours during that aborts the process.
    os._exit(0)
