"""`powersgd(r)` under the wrappers: where it serves, what the report says, and a sentence where it cannot serve."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slow
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import CLASSES, INPUTS, SMALL_BUCKETS, WIDTH, Trained, network, same, same_training, sgd, train

import commpress
from commpress.comm.codecs import parse
from commpress.optim import OneBitAdamW

SPEC = "powersgd(2)"
SHARDS = (
    "powersgd(2) sends whole matrices as factors; a sharded model's ranks hold parts of them; expected another spec"
)


def replica(seed: int = 0) -> Any:
    return DistributedDataParallel(network(seed), bucket_cap_mb=SMALL_BUCKETS)


def sharded() -> Any:
    model: Any = network()
    for part in (model[0], model[2], model):
        fully_shard(part)
    return model


def refusals() -> dict[str, str]:
    """What is said to what cannot be done, by what was tried; then a training all the same."""
    model = replica()
    optimizer = OneBitAdamW(model.parameters(), lr=1e-3, warmup_steps=2)
    codec, x, local = parse(SPEC), torch.ones(5000), network()
    said = {
        "encode": outcome(lambda: codec.encode(x)),
        "decode": outcome(lambda: codec.decode(torch.zeros(8, dtype=torch.uint8), 5000)),
        "FSDP2": outcome(lambda: commpress.attach(sharded(), SPEC)),
        "FSDP2's parameters": outcome(lambda: commpress.attach(sharded(), "int4", parameters=SPEC)),
        "an optimizer": outcome(lambda: commpress.attach(model, SPEC, optimizer=optimizer)),
        "its warm-up": outcome(lambda: OneBitAdamW(model.parameters(), lr=1e-3, warmup_spec=SPEC)),
        "outer": outcome(lambda: commpress.diloco(local, sgd(local), SPEC, every=2)),
        "broadcast": outcome(lambda: commpress.broadcast_parameters(network(), SPEC)),
        "another exchange": outcome(lambda: commpress.attach(model, SPEC, exchange="two_shot")),
        "its exchange": outcome(lambda: commpress.attach(model, "int4", exchange="low_rank")),
        "behind topk": outcome(lambda: commpress.attach(model, f"topk(0.1)|{SPEC}")),
        "in front": outcome(lambda: commpress.attach(model, f"{SPEC}|int4")),
        "no rank": outcome(lambda: commpress.attach(model, "powersgd(0)")),
        "half a rank": outcome(lambda: commpress.attach(model, "powersgd(0.5)")),
        "differ": outcome(lambda: commpress.attach(model, f"powersgd({1 + dist.get_rank()})")),
    }
    session = commpress.attach(model, SPEC)
    masks = {"0.weight": torch.ones(WIDTH, INPUTS, dtype=torch.bool)}
    said["masks"] = outcome(lambda: session.set_masks(masks))
    train(model, range(2))
    return said | {"spec": session.report().spec, "steps": str(session.report().steps)}


def test_where_it_cannot_serve_a_sentence_says_what_to_take() -> None:
    one, other = run(2, refusals)
    assert one == other
    for case in ("encode", "decode"):
        assert "powersgd(2) cannot code flat values: it needs the shapes of a model's parameters" in one[case]
    assert one["FSDP2"] == f"ValueError: gradients: {SHARDS}, such as int4"
    assert one["FSDP2's parameters"] == f"ValueError: parameters: {SHARDS}, such as int4"
    assert "OneBitAdamW sends no gradients" in one["an optimizer"]
    assert "warmup_spec of OneBitAdamW is for flat gradients" in one["its warm-up"]
    assert "the fragments of an outer sync have parts of parameters" in one["outer"]
    assert "a broadcast has the values of one rank" in one["broadcast"]
    assert "masks leave no matrices whole" in one["masks"]
    for case in ("an optimizer", "its warm-up", "outer", "broadcast", "masks"):
        assert one[case].startswith("ValueError: ")
        assert "expected another spec, such as int4" in one[case]
    assert "exchange='two_shot': powersgd(2) needs low_rank; leave exchange out" in one["another exchange"]
    assert "exchange='low_rank': int4 needs two_shot; leave exchange out" in one["its exchange"]
    assert (
        "powersgd(2) codes matrices, and the values of topk are not matrices; expected int4 or sign"
        in one["behind topk"]
    )
    assert "only the values of one of topk(...), randomk(...), rotate can be coded" in one["in front"]
    assert "powersgd(0): the rank must be at least 1, got 0" in one["no rank"]
    assert "powersgd takes a rank, as in powersgd(4), got (0.5)" in one["half a rank"]
    assert "rank 1 has spec 'powersgd(2)', rank 0 has 'powersgd(1)'" in one["differ"]
    assert (one["spec"], one["steps"]) == (SPEC, "2")


def by_rules() -> tuple[Trained, Trained, list[dict[str, Any]]]:
    """Matrices by it, the last layer by int4, biases as they are: three steps more, and the same by new objects."""
    rules = {"4.*": "int4", "*.bias": "none", "*": SPEC}
    model = replica()
    session, optimizer = commpress.attach(model, rules), sgd(model)
    train(model, range(3), optimizer=optimizer)
    state, saved = session.state_dict(), copy.deepcopy((model.module.state_dict(), optimizer.state_dict()))
    whole = train(model, range(3, 6), optimizer=optimizer)
    rows = session.report().to_dict()["rows"]
    again = replica(9)
    session, optimizer = commpress.attach(again, rules), sgd(again)
    again.module.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    session.load_state_dict(state)
    return whole, train(again, range(3, 6), optimizer=optimizer), rows


def test_rules_name_it_for_some_parameters_and_a_restart_goes_on() -> None:
    ranks = run(2, by_rules)
    for whole, pieced, rows in ranks:
        assert same(whole.parameters, ranks[0][0].parameters)
        assert same_training(whole, pieced)
        found = {(row["spec"], row["exchange"]) for row in rows}
        assert {(SPEC, "low_rank"), ("int4", "one_shot")} <= found


def many_buckets(cap: float) -> tuple[Trained, int]:
    """A training whose tensors are spread over as many buckets as DDP makes."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        parts: list[nn.Module] = [nn.Linear(INPUTS, WIDTH)]
        for _ in range(6):
            parts += [nn.Tanh(), nn.Linear(WIDTH, WIDTH)]
        model = DistributedDataParallel(nn.Sequential(*parts, nn.Linear(WIDTH, CLASSES)), bucket_cap_mb=cap)
    session = commpress.attach(model, SPEC, verify=1)
    trained = train(model, range(8))
    return trained, len({row["bucket"] for row in session.report().to_dict()["rows"]})


@pytest.mark.parametrize("world_size", [2, slow(4)])
def test_many_buckets_go_in_one_order_on_all_ranks(world_size: int) -> None:
    ranks = run(world_size, many_buckets, 0.01)
    for trained, buckets in ranks:
        assert buckets >= 7
        assert same_training(trained, ranks[0][0])


def by_adam() -> int:
    """How many warnings say that it loses under Adam."""
    model = replica()
    commpress.attach(model, SPEC)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, range(2), optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))
    return sum("powersgd(2) leaves a few directions of a gradient, and AdamW divides" in str(w.message) for w in caught)


def test_beside_adam_a_word_says_what_that_costs() -> None:
    assert run(2, by_adam) == [1, 0]
