"""Loops of one's own under DDP, and what each rank of them finds; `rank_workers.py` runs them."""

import copy
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.storage.distributed import full
from hf_topkast.surgery import sparse_layers


# Settings under which the sparse parameters become smaller during the six steps of `sizes_change`.
RESIZING = {
    "explored": {"explore_until": 3},
    "scheduled": {"initial_density": 0.6, "density_schedule": "linear", "schedule_begin": 0, "schedule_end": 4},
    "global": {"distribution": "global"},
    "chosen ahead": {"refresh_lag": 1, "explore_until": 5},
}


def plain_loops(directory: str):
    """Loops of one's own under DDP; each rank writes what it found to `facts-RANK.json`."""
    dist.init_process_group("gloo")
    facts = {
        "steps": {name: sizes_change(Path(directory, f"{name}.pt"), **config) for name, config in RESIZING.items()},
        "resumed": {name: resumed_apart(**config) for name, config in RESIZING.items()},
        "unwrapped": refusal(lambda model: TopKastController(model.module, sgd(model)), explore_until=2),
        "unwrapped, by hand": refusal(lambda model: TopKastController(model.module, sgd(model)).end_exploration()),
        "unwrapped, other settings": refusal(with_a_larger_b),
        "static graph": refusal(of_a_static_graph, explore_until=2),
        "loaded last": refusal(loaded_last),
        "join": refusal(joined),
        "hooks": {name: compressed(register) for name, register in COMPRESSIONS.items()},
        "other sets": refusal(TopKastController, lambda model: sgd(model), seed=dist.get_rank()),
        "other calibration": refusal(TopKastController, sgd, calibration=token_batches(1, seed=dist.get_rank())),
        "drift": refusal(drift),
        "nan": refusal(one_nan),
    }
    Path(directory, f"facts-{dist.get_rank()}.json").write_text(json.dumps(facts))


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make_ddp(seed: int = 0, **config) -> DistributedDataParallel:
    model = sparsify(make_gpt2(seed), **{"density": 0.2, "refresh_every": 2, **config})
    return DistributedDataParallel(model)


def step(model, optimizer, tokens):
    (loss_of(model, tokens) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """θ and sets of the sparse layers and all other parameters, gathered; copies."""
    state = {name: full(parameter.detach()).clone() for name, parameter in model.named_parameters()}
    for name, layer in sparse_layers(model):
        del state[f"{name}.values"]
        state.pop(f"{name}.columns", None)
        state[f"{name}.theta"], state[f"{name}.sets"] = layer.theta(), layer.active_mask.int() + layer.backward_mask
        if layer.input_norms is not None:
            state[f"{name}.input_norms"] = layer.input_norms.clone()
    return state


def count_bytes(model: DistributedDataParallel) -> list[int]:
    """A list that a communication hook fills with the bytes of each bucket it sends."""
    sent = []

    def hook(state, bucket):
        sent.append(bucket.buffer().nbytes)
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda reduced: reduced.value()[0] / dist.get_world_size())

    model.register_comm_hook(None, hook)
    return sent


def sizes_change(path: Path, **config) -> list[dict]:
    """Bytes sent and bytes trained in each step of a training whose sets shrink; rank 0 saves where it led."""
    model = make_ddp(**config)
    sent = count_bytes(model)
    optimizer = sgd(model)
    TopKastController(model, optimizer)
    steps = []
    for tokens in token_batches(6):
        trained = sum(parameter.nbytes for parameter in model.parameters())
        with model.no_sync():
            (loss_of(model, tokens.chunk(3)[dist.get_rank()]) / 2).backward()
        step(model, optimizer, tokens.chunk(3)[2])
        steps.append({"sent": sum(sent), "trained": trained})
        sent.clear()
    if dist.get_rank() == 0:
        torch.save(whole(model.module), path)
    return steps


def resumed_apart(**config) -> dict[str, float]:
    """How far a training that goes on in a new wrapper, of other sizes, comes from one that was not stopped."""

    def begin():
        model = make_ddp(**config)
        optimizer = sgd(model)
        return model, optimizer, TopKastController(model, optimizer)

    def train(model, optimizer, batches):
        for tokens in batches:
            step(model, optimizer, tokens.chunk(2)[dist.get_rank()])

    batches = token_batches(8)
    first = begin()
    train(*first[:2], batches[:5])
    states = copy.deepcopy([part.state_dict() for part in first])
    train(*first[:2], batches[5:])
    first[2].remove()
    second = begin()
    for part, state in zip(second, states):
        part.load_state_dict(state)
    train(*second[:2], batches[5:])
    expected, found = whole(first[0].module), whole(second[0].module)
    apart = max(float((found[key].double() - number.double()).abs().max()) for key, number in expected.items())
    shown = torch.cat([number.double().flatten() for number in found.values()])
    others = [torch.empty_like(shown) for _ in range(dist.get_world_size())]
    dist.all_gather(others, shown)
    return {"from uninterrupted": apart, "between ranks": float((others[0] - others[1]).abs().max())}


COMPRESSIONS = {
    "built in": lambda model: model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS),
    "fp16": lambda model: model.register_comm_hook(None, fp16_compress_hook),
    "power": lambda model: model.register_comm_hook(
        PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1), powerSGD_hook
    ),
}


def compressed(register) -> list[list[bool]]:
    """For each step of a training whose sets shrink: whether gradients are of fp16, of rank 1, and finite."""
    model = make_ddp(explore_until=3)
    register(model)
    optimizer = sgd(model)
    TopKastController(model, optimizer)
    steps = []
    for tokens in token_batches(6):
        (loss_of(model, tokens.chunk(2)[dist.get_rank()]) / 2).backward()
        gradient = model.module.transformer.wpe.weight.grad
        steps.append(
            [
                torch.equal(gradient.half().float(), gradient),
                int(torch.linalg.matrix_rank(gradient)) == 1,
                all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters()),
            ]
        )
        optimizer.step()
        optimizer.zero_grad()
    return steps


def joined(model):
    optimizer = sgd(model)
    TopKastController(model, optimizer)
    with model.join():
        step(model, optimizer, token_batches(1)[0])


def with_a_larger_b(model):
    """A controller that knows no wrapper, and settings that a refresh makes B larger by."""
    optimizer = sgd(model)
    TopKastController(model.module, optimizer)
    model.module.topkast.config.backward_density = 0.6
    for tokens in token_batches(3):
        step(model, optimizer, tokens)


def of_a_static_graph(model):
    model = DistributedDataParallel(model.module, static_graph=True)
    TopKastController(model, sgd(model))


def loaded_last(model):
    """The state of a model with a smaller B, when the controller is there already."""
    optimizer = sgd(model)
    TopKastController(model, optimizer)
    model.module.load_state_dict(make_ddp(backward_density=0.25).module.state_dict())
    step(model, optimizer, token_batches(1)[0])


def refusal(run, second=None, seed: int = 0, **config) -> str:
    model = make_ddp(seed, **config)
    try:
        run(model) if second is None else run(model, second(model))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was raised"


def drift(model):
    """Rank 1 loses its way between two refreshes."""
    optimizer = sgd(model)
    controller = TopKastController(model, optimizer)
    if dist.get_rank() == 1:
        _, layer = list(sparse_layers(model))[2]
        layer.values.data.neg_().exp_()
    controller.refresh()


def one_nan(model):
    """A number of rank 1 is lost."""
    controller = TopKastController(model, sgd(model))
    if dist.get_rank() == 1:
        list(sparse_layers(model))[2][1].values.data[0] = torch.nan
    controller.refresh()
