"""The exchange by nodes: who is in one, what it sends, what its ranks remember, and what happens when one of them dies."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from battery import gradient
from ranks import Died, outcome, run
from tiers import slow
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training import SMALL_BUCKETS, network, same_training, train

import commpress
from commpress.comm import cost
from commpress.comm.cost import Cluster, Speed
from commpress.comm.exchange import Hierarchical, named
from commpress.comm.plan import Plan
from commpress.comm.replicas import replicas_session
from commpress.comm.segments import Segment

CPU = torch.device("cpu")
N = 70_001
SEGMENTS = (Segment("p", N),)
NODES_OF_TWO = "hierarchical(2)"


def session_of(exchange: str = NODES_OF_TWO, spec: str = "int4") -> commpress.Session:
    return replicas_session(spec, dist.group.WORLD, CPU, exchange=exchange)


def exchanged(session: commpress.Session, step: int) -> Tensor:
    """The mean of the ranks' gradients of a step."""
    assert session.step_buffer is not None
    return session.step_buffer.submit(own(session.rank, step), SEGMENTS, 0, last=True).wait()


def own(rank: int, step: int) -> Tensor:
    return gradient(N, 100 * rank + step)


def withheld(session: commpress.Session) -> Tensor:
    """What this rank's memory will add to the means to come."""
    total, W = torch.zeros(N, dtype=torch.float64), session.world_size
    for kept in session.state_dict()["memories"][0]:
        if kept["residual"] is not None:
            total += kept["residual"].double() / W
        if kept["slice_residual"] is not None:
            start, stop, ranks, n = kept["node_slice"]
            assert n == N
            total[start:stop] += kept["slice_residual"].double() * ranks / W
        if kept["owner_residual"] is not None:
            start = kept["owner_start"]
            total[start : start + kept["owner_residual"].numel()] += kept["owner_residual"].double()
    return total


def same(x: Tensor | int, y: Tensor) -> bool:
    """Whether two sums differ by no more than float32 rounds."""
    return bool((x - y).abs().max() <= 1e-6 * y.abs().max())


# --- who is in a node --------------------------------------------------------------------------------------------


def by_environment(sizes: list[int], exchange: str, members: list[int] | None) -> str:
    """The exchange of a session of these ranks, each of which is told that so many are on its node; or what it refuses."""
    group = dist.group.WORLD if members is None else dist.new_group(members)
    if members is not None and dist.get_rank() not in members:
        return ""
    size = sizes[dist.get_rank()]
    environment = {"LOCAL_WORLD_SIZE": str(size)} if size else {}
    with mock.patch.dict(os.environ, environment):
        if not size:
            os.environ.pop("LOCAL_WORLD_SIZE", None)
        found: list[str] = []
        said = outcome(
            lambda: found.append(
                str(replicas_session("int4", group, CPU, exchange=exchange).collectives[0].gradients.exchange)
            )
        )
    return said or found[0]


@pytest.mark.parametrize(("sizes", "exchange", "members", "expected"), [
    ([2, 2, 2, 2], "hierarchical", None, "hierarchical(2)"),
    ([4, 4, 4, 4], NODES_OF_TWO, None, "hierarchical(2)"),  # what is said counts
    ([4, 4, 4, 4], "hierarchical", None, "hierarchical(4)"),
    ([2, 2, 2, 2], "hierarchical", [0, 2], "hierarchical(1)"),  # of a group the ranks on a node that are in it
    ([2, 2, 2, 2], "hierarchical", [0, 2, 3],
     "rank 0: exchange 'hierarchical': with LOCAL_WORLD_SIZE 2 the nodes have 1, 2 of these ranks, one after another; all "),
    ([3, 3, 3, 1], "hierarchical", None, "rank 0: exchange 'hierarchical': with LOCAL_WORLD_SIZE 3 the nodes have 3, 1 of the"),
    ([2, 2, 2, 1], "hierarchical", None,
     "rank 3 has exchange 'hierarchical(1)', rank 0 has 'hierarchical(2)': all ranks must use the same exchange"),
    ([2, 0, 2, 2], "hierarchical", None, "rank 1: exchange 'hierarchical': LOCAL_WORLD_SIZE is '', expected the number of ran"),
    ([2, 2, 2, 2], "hierarchical(3)", None, "rank 0: exchange 'hierarchical(3)': 4 ranks do not make nodes of 3; all nodes m"),
    ([2, 2, 2, 2], "hierarchical(0)", None, "rank 0: unknown exchange 'hierarchical(0)', known: all_reduce, two_shot, one_sho"),
])  # fmt: skip
def test_all_ranks_agree_on_who_is_in_a_node(
    sizes: list[int], exchange: str, members: list[int] | None, expected: str
) -> None:
    for rank, said in enumerate(run(4, by_environment, sizes, exchange, members)):
        if members is None or rank in members:
            # the rank that is wrong says what is wrong, without its number
            assert expected in said or expected.split(": ", 1)[1] in said, said
            assert not expected.startswith("rank") or said.startswith("ValueError: ")


def test_an_exchange_that_knows_no_nodes_says_what_it_expects() -> None:
    with pytest.raises(
        ValueError, match=r"'hierarchical': expected the number of ranks per node, as in 'hierarchical\(8\)'"
    ):
        Plan.of("int4", "hierarchical").choose(5000, 4, 8)


def alone_on_a_node() -> tuple[Tensor, list[dict[str, Any]]]:
    session = session_of("hierarchical(2)")
    return exchanged(session, 0), session.report().to_dict()["rows"]  # type: ignore[return-value]


def test_on_one_node_nothing_is_compressed() -> None:
    for mean, (row,) in run(2, alone_on_a_node):
        assert torch.equal(mean, own(0, 0) * 0.5 + own(1, 0) * 0.5)
        assert (row["spec"], row["exchange"]) == ("none", "all_reduce")
        assert row["reason"] == "one node: nothing goes between nodes"


def refuses_dgc() -> str:
    model = DistributedDataParallel(network())
    optimizer = commpress.optim.DGC(model.parameters(), lr=0.1)
    return outcome(lambda: commpress.attach(model, "topk(0.1)", optimizer=optimizer, exchange=NODES_OF_TWO))


def test_an_optimizer_that_clears_momenta_where_a_rank_has_sent_is_refused() -> None:
    for said in run(4, refuses_dgc):
        assert said.startswith(
            "ValueError: exchange 'hierarchical(2)': DGC clears each rank's momentum where that rank"
        )


# --- what it sends, and what it costs ----------------------------------------------------------------------------


def sent() -> dict[str, Any]:
    """The rows of both exchanges, the report's words, and bytes of memory."""
    found: dict[str, Any] = {}
    for name in (NODES_OF_TWO, "two_shot"):
        session = session_of(name)
        exchanged(session, 0)
        report, (kept,) = session.report(), session.state_dict()["memories"][0]
        found[name] = report.rows[0]
        found[f"{name} memory"] = sum(v.nbytes for v in kept.values() if isinstance(v, Tensor))
        found[f"{name} text"] = str(report)
    return found


def test_a_node_sends_each_value_once_and_each_rank_remembers_its_slice() -> None:
    codec, plan = commpress.parse("int4"), Plan.of("int4", NODES_OF_TWO)
    for rank, got in enumerate(run(4, sent)):
        row, flat = got[NODES_OF_TWO], got["two_shot"]
        assert row.sent_bytes - row.inside_bytes == pytest.approx(codec.nbytes(N // 2), abs=200)
        assert row.inside_bytes == pytest.approx(4 * N, abs=4 * 256)  # half of it twice, rounded to blocks
        # two of the three others are on the other node
        assert row.sent_bytes - row.inside_bytes == pytest.approx(2 / 3 * flat.sent_bytes / 2, rel=0.01)
        assert flat.inside_bytes == 0
        assert got[f"{NODES_OF_TWO} memory"] == pytest.approx(4 * N / 2, abs=4 * 256)
        assert "MB a step stayed inside the node" in got[f"{NODES_OF_TWO} text"]
        assert "stayed inside" not in got["two_shot text"]

        messages = cost.transfers(plan.choose(N, 4, 4), N, 4, 4, rank, 2)
        assert sum(m.sent for m in messages) == row.sent_bytes
        assert sum(m.received for m in messages) == row.received_bytes
        assert sum(m.crossing for m in messages) == 2 * (row.sent_bytes - row.inside_bytes)
        memory = cost.feedback_bytes(plan, [N], 4)
        assert memory == pytest.approx(got[f"{NODES_OF_TWO} memory"], abs=4 * 256)


def test_it_is_predicted_to_pay_where_the_network_is_slow() -> None:
    speed = Speed(1e-9, (0.5e-9, 0.2e-9), (0.8e-9, 0.2e-9))
    seconds = {}
    for bandwidth in (1e8, 1e12):
        cluster = Cluster(32, bandwidth, ranks_per_host=8)
        for exchange in ("two_shot", "hierarchical(8)"):
            seconds[exchange, bandwidth] = cost.step(Plan.of("int4", exchange), [10**7], speed, cluster).seconds
    assert seconds["hierarchical(8)", 1e8] < 0.3 * seconds["two_shot", 1e8]
    # eight times as little to encode and decode
    assert seconds["hierarchical(8)", 1e12] < 0.3 * seconds["two_shot", 1e12]


# --- what its ranks remember -------------------------------------------------------------------------------------


def saves(folder: str, exchange: str, steps: int) -> tuple[Tensor, Tensor]:
    session = session_of(exchange)
    mean = torch.stack([exchanged(session, step).clone() for step in range(steps)])
    torch.save(session.state_dict(), f"{folder}/{session.rank}.pt")
    return mean, withheld(session)


def goes_on(folder: str, exchange: str, old: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is remembered by a rank of another run, the mean of one more step, and what is remembered then."""
    session = session_of(exchange)
    states = [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(old)]
    session.load_state_dict(states[session.rank] if old == session.world_size else states)
    before = withheld(session)
    return before, exchanged(session, 9), withheld(session)


@pytest.mark.parametrize(("old", "first", "new", "second"), [
    (4, NODES_OF_TWO, 4, NODES_OF_TWO), (4, NODES_OF_TWO, 2, "hierarchical(1)"), (2, "hierarchical(1)", 4, NODES_OF_TWO),
    slow(4, "hierarchical(1)", 4, NODES_OF_TWO), slow(4, NODES_OF_TWO, 3, "hierarchical(1)"),
    slow(4, NODES_OF_TWO, 2, NODES_OF_TWO), slow(6, NODES_OF_TWO, 4, NODES_OF_TWO),
])  # fmt: skip
def test_other_nodes_go_on_with_what_was_withheld(old: int, first: str, new: int, second: str, tmp_path: Path) -> None:
    kept = sum(of_rank for _, of_rank in run(old, saves, str(tmp_path), first, 3))
    assert kept.abs().max() > 0.1
    ranks = run(new, goes_on, str(tmp_path), second, old)
    assert same(sum(before for before, _, _ in ranks), kept)
    offered = kept + torch.stack([own(rank, 9) for rank in range(new)]).double().mean(0)
    for _, mean, _ in ranks:
        assert same(mean.double() + sum(after for _, _, after in ranks), offered)
        assert torch.equal(mean, ranks[0][1])


def with_masks() -> tuple[Tensor, Tensor, Tensor, int]:
    """Before masks and behind them: what is remembered, a mean, what is remembered then, and the length of the memory."""
    session = replicas_session("int4", dist.group.WORLD, CPU, exchange=NODES_OF_TWO, parameters=SEGMENTS)
    exchanged(session, 0)
    before = withheld(session)
    session.set_masks({"p": torch.arange(N) % 3 > 0})
    mean = exchanged(session, 1)
    (kept,) = session.state_dict()["memories"][0]
    return before, mean, kept["slice_residual"], kept["node_slice"][-1]


def test_what_masks_keep_is_sent_by_nodes_too() -> None:
    ranks, keep = run(4, with_masks), torch.arange(N) % 3 > 0
    offered = sum(before for before, _, _, _ in ranks) + torch.stack([own(r, 1) for r in range(4)]).double().mean(0)
    slices = [torch.cat([ranks[2 * node][2], ranks[2 * node + 1][2]]).double() for node in range(2)]
    missing = torch.zeros(N, dtype=torch.float64)
    missing[keep] = (slices[0] + slices[1]) / 2
    for _, mean, _, n in ranks:
        assert n == int(keep.sum())
        assert torch.equal(mean, ranks[0][1])
        assert not mean[~keep].any()
        assert same((mean + missing)[keep], offered[keep])


def by_another_codec() -> tuple[bool, Tensor, Tensor]:
    """A plan that changes between two steps: whether the memory is of a slice, what was remembered, and what is offered now."""
    session = session_of("hierarchical(1)")
    exchanged(session, 0)
    kept = withheld(session)
    session.collectives[0].gradients = Plan.of("int8", "one_shot")
    mean = exchanged(session, 1)
    (state,) = session.state_dict()["memories"][0]
    return state["slice_residual"] is None, kept, mean.double() / 4 + withheld(session)


def test_another_exchange_takes_over_what_a_slice_remembers() -> None:
    ranks = run(4, by_another_codec)
    assert all(whole for whole, _, _ in ranks)
    offered = sum(kept for _, kept, _ in ranks) + torch.stack([own(r, 1) for r in range(4)]).double().mean(0)
    assert same(sum(now for _, _, now in ranks), offered)


def checkpointed(folder: str) -> bool:
    """Whether a training goes on bit for bit from torch's distributed checkpoint."""
    import torch.distributed.checkpoint as dcp

    def started() -> tuple[Any, Any]:
        ddp = DistributedDataParallel(network(), bucket_cap_mb=SMALL_BUCKETS)
        optimizer = commpress.optim.OneBitAdamW(ddp.parameters(), lr=1e-3, warmup_steps=2)
        return ddp, commpress.attach(ddp, "sign", exchange=NODES_OF_TWO, optimizer=optimizer)

    def trained(ddp: Any, session: Any, steps: range) -> Any:
        return train(ddp, steps, optimizer=session._optimizer)

    ddp, session = started()
    trained(ddp, session, range(5))
    dcp.save({"model": ddp.module.state_dict(), "commpress": session}, checkpoint_id=folder)
    whole = trained(ddp, session, range(5, 8))
    ddp, session = started()
    state = {"model": ddp.module.state_dict(), "commpress": session}
    dcp.load(state, checkpoint_id=folder)
    ddp.module.load_state_dict(state["model"])
    return same_training(whole, trained(ddp, session, range(5, 8)))


def test_a_training_goes_on_bit_for_bit_from_a_distributed_checkpoint(tmp_path: Path) -> None:
    assert run(4, checkpointed, str(tmp_path)) == [True] * 4


# --- when one of them dies ---------------------------------------------------------------------------------------


def loses(bad_rank: int, within: str) -> str:
    """What a rank says when another one dies before its second exchange, or in the middle of it."""
    session = session_of()
    exchanged(session, 0)
    if session.rank == bad_rank and within == "before":
        os._exit(7)
    if session.rank == bad_rank:
        sound = Hierarchical.run

        def dies(self: Any, *arguments: Any) -> Any:
            for i, transfer in enumerate(sound(self, *arguments)):
                if i == int(within):
                    os._exit(7)
                yield transfer

        Hierarchical.run = dies  # type: ignore[method-assign]
    return outcome(lambda: exchanged(session, 1))


@pytest.mark.parametrize(("bad_rank", "within"), [(3, "before"), (0, "1"), (1, "2")])
def test_a_rank_that_dies_ends_the_exchange_of_all_nodes_and_is_named(bad_rank: int, within: str) -> None:
    said = run(4, loses, bad_rank, within, fresh=True, group_timeout=300)
    assert said[bad_rank] == Died(7)
    for rank, text in enumerate(said):
        if rank != bad_rank:
            assert f"rank {bad_rank} (" in text, text
            assert "is gone" in text, text


def test_its_text_names_it() -> None:
    assert [str(named(text)) for text in ("hierarchical", "hierarchical(8)", "two_shot")] == [
        "hierarchical", "hierarchical(8)", "two_shot",
    ]  # fmt: skip
