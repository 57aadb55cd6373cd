"""A wrapped model is a model: it is copied, pickled, averaged; a copy has no session and says so when it is trained."""

import contextlib
import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import outcome, run
from tiers import slowly
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from training import SMALL_BUCKETS, batch, loss_of, network, parameters_of, same, same_training, sgd, train

import commpress
from commpress.hooks.ddp import CommState, comm_hook

SAYS = "is a copy of one that was attached"


def with_buffers() -> nn.Module:
    """A network with a batch norm, whose buffers DDP broadcasts."""
    model = network()
    model[1] = nn.Sequential(nn.BatchNorm1d(64), nn.Tanh())
    return model


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "copy": copy.copy,
    "copy of a copy": lambda x: copy.deepcopy(pickled(x)),
}


def attached(spec: str | None, **settings: Any) -> tuple[DistributedDataParallel, Any]:
    """A DDP module that has been trained for two steps, with a timeline in the second."""
    ddp = DistributedDataParallel(with_buffers(), bucket_cap_mb=SMALL_BUCKETS)
    session = None if spec is None else commpress.attach(ddp, spec, buffers="int8", **settings)
    optimizer = sgd(ddp)
    train(ddp, range(1), optimizer=optimizer)
    with contextlib.nullcontext() if session is None else session.timeline():
        train(ddp, range(1, 2), optimizer=optimizer)
    return ddp, session


def heard(action: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What an action returns, and the warnings of ours in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = action()
    return value, [str(w.message) for w in caught if "commpress" in str(w.message)]


def copies(way: str) -> dict[str, Any]:
    """What becomes of the original, of a copy that is evaluated, trained, attached, and of one of plain DDP."""
    got: dict[str, Any] = {}
    ddp, session = attached("int4")
    plain, _ = attached(None)
    plain.load_state_dict(ddp.state_dict())
    before, threads = session.report().sent_bytes, threading.active_count()
    duplicate, got["at the copy"] = heard(lambda: WAYS[way](ddp))
    got["threads"] = threading.active_count() - threads
    got["same"] = same(parameters_of(ddp), parameters_of(duplicate))
    x, _ = batch(9, dist.get_rank())
    with torch.no_grad():
        got["evaluated"], got["at evaluation"] = heard(lambda: duplicate.eval()(x))
        got["as it was"] = ddp.eval()(x)
    ddp.train()
    duplicate.train()
    buffers_sent = session.report().roles["buffers"]["sent_bytes"]
    reference = WAYS[way](plain)
    trained, said = heard(lambda: train(duplicate, range(2, 4)))
    got["as plain"] = same_training(trained, train(reference, range(2, 4)))
    got["said"] = said
    if way != "copy":  # which has the buffers' hook in common with the original, and its parameters
        assert session.report().roles["buffers"]["sent_bytes"] == buffers_sent
        assert session.report().roles["gradients"]["sent_bytes"] <= before
        again, got["at attach"] = heard(lambda: commpress.attach(duplicate, "int4", buffers="int8"))
        _, got["when it is attached"] = heard(lambda: train(duplicate, range(4, 6)))
        got["ratio"] = again.report().to_dict()["roles"]["gradients"]["dense_bytes"]
    _, got["of the original"] = heard(lambda: train(ddp, range(4, 6)))
    got["steps"] = session.report().steps
    return got


@pytest.mark.parametrize("way", slowly(WAYS, quick=("deepcopy", "pickle", "copy")))
def test_a_copy_is_evaluated_trained_and_attached(way: str) -> None:
    for rank, got in enumerate(run(2, copies, way)):
        assert (got["at the copy"], got["same"]) == ([], True)
        assert got["threads"] <= 0  # those of sessions before may end meanwhile
        assert got["at evaluation"] == []
        # rank 0's buffers as they are, on all ranks; the original sends them by int8
        torch.testing.assert_close(got["evaluated"], got["as it was"], rtol=0, atol=0 if rank == 0 else 0.02)
        assert got["as plain"]  # dense, by DDP
        assert [SAYS in text for text in got["said"]] == [True] * (rank == 0)  # once, from rank 0
        assert got["of the original"] == []
        if way != "copy":
            assert got["steps"] == 4
            assert got["at attach"] == got["when it is attached"] == []
            assert got["ratio"] > 0


def original_goes_on(way: str) -> tuple[Any, Any]:
    """A training in the middle of which a copy is made, and one without."""
    trainings = []
    for copied in (False, True):
        ddp = DistributedDataParallel(with_buffers(), bucket_cap_mb=SMALL_BUCKETS)
        commpress.attach(ddp, "topk(0.01)|int4", buffers="int8")
        optimizer = sgd(ddp)
        train(ddp, range(2), optimizer=optimizer)
        if copied:
            duplicate = WAYS[way](ddp)
            del duplicate
            gc.collect()
        trainings.append(train(ddp, range(2, 5), optimizer=optimizer))
    return trainings[0], trainings[1]


@pytest.mark.parametrize("way", slowly(WAYS, quick=("deepcopy", "pickle", "copy")))
def test_a_copy_does_not_change_the_original(way: str) -> None:
    for undisturbed, copied in run(2, original_goes_on, way):
        assert same_training(undisturbed, copied)


def averaged() -> dict[str, Any]:
    """An average of a training's weights, of the wrapped model, with and without us."""
    got: dict[str, Any] = {}
    for spec in (None, "none"):
        ddp = DistributedDataParallel(with_buffers())
        if spec is not None:
            commpress.attach(ddp, spec)
        mean = AveragedModel(ddp, use_buffers=True)
        optimizer = sgd(ddp)
        for step in range(3):
            train(ddp, [step], optimizer=optimizer)
            _, said = heard(lambda mean=mean, ddp=ddp: mean.update_parameters(ddp))
            assert said == []
        x, _ = batch(9, dist.get_rank())
        with torch.no_grad():
            got[str(spec)] = [*parameters_of(mean), mean.eval()(x)]
        torch.optim.swa_utils.update_bn([batch(step, dist.get_rank())[0] for step in range(2)], mean)
        got[str(spec)] += [b.clone() for b in mean.buffers()]
    return got


def test_an_average_of_a_wrapped_model() -> None:
    for got in run(2, averaged):
        assert same(got["None"], got["none"])


def compiled_copies() -> list[str]:
    """Copies of a compiled and attached model, and what the copy says."""
    ddp = torch.compile(DistributedDataParallel(network()), backend="eager")
    commpress.attach(ddp, "int4")
    train(ddp, range(2), optimizer=torch.optim.SGD(ddp.parameters(), lr=0.1))  # type: ignore[arg-type]
    said = []
    for way in (copy.deepcopy, saved):
        duplicate = way(ddp)
        optimizer = torch.optim.SGD(duplicate.parameters(), lr=0.1)
        said += heard(lambda duplicate=duplicate, o=optimizer: train(duplicate, range(2), optimizer=o))[1]
    return said


@pytest.mark.slow
def test_copies_of_a_compiled_model() -> None:
    one, other = run(2, compiled_copies, timeout=120)
    assert [SAYS in text for text in one] == [True, True]
    assert other == []


# --- states, buffers, optimizers ---------------------------------------------------------------------------------


def states() -> dict[str, Any]:
    """A CommState that is saved beside a model and registered in the run that goes on, as PyTorch's documents have it."""
    got: dict[str, Any] = {}
    ddp = DistributedDataParallel(network())
    state = CommState("int4", exchange="two_shot", error_feedback=False)
    ddp.register_comm_hook(state, comm_hook)
    train(ddp, range(2))
    file = io.BytesIO()
    torch.save({"model": ddp.state_dict(), "hook": comm_hook, "hook's state": state}, file)
    got["bytes"] = len(pickle.dumps(state))
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = DistributedDataParallel(network())
    again.load_state_dict(loaded["model"])
    again.register_comm_hook(loaded["hook's state"], loaded["hook"])
    _, got["said"] = heard(lambda: train(again, range(2, 4)))
    session = loaded["hook's state"].session
    got["settings"] = session.collectives[0].gradients.settings()
    got["steps"] = session.report().steps
    # what cannot be copied is missed before anything is sent
    for lost, settings in {
        "grad_scaler": {"grad_scaler": torch.amp.GradScaler("cpu")},
        "process group": {"group": dist.new_group([0, 1])},
    }.items():
        other = DistributedDataParallel(network())
        other.register_comm_hook(copy.deepcopy(CommState("int4", **settings)), comm_hook)  # type: ignore[arg-type]
        got[lost] = outcome(lambda other=other: loss_of(other, 0).backward())
    return got


def test_a_saved_hook_state_starts_anew_and_says_so() -> None:
    for rank, got in enumerate(run(2, states)):
        assert got["bytes"] < 1000  # no parameters, no feedback
        assert [("starts anew" in text) for text in got["said"]] == [True] * (rank == 0)
        assert got["settings"] == {"codec": "int4", "exchange": "two_shot", "error_feedback": False}
        assert got["steps"] == 2
        for lost in ("grad_scaler", "process group"):
            assert f"this CommState is a copy, without the {lost}" in got[lost]


def sessions() -> list[str]:
    """What is said to those who copy a session, or pickle an outer one's model and optimizer."""
    ddp = DistributedDataParallel(network())
    session = commpress.attach(ddp, "int4")
    return [outcome(lambda: copy.deepcopy(session)), outcome(lambda: pickle.dumps(session))]


def test_a_session_is_not_copied() -> None:
    for said in run(2, sessions):
        for text in said:
            assert text.startswith(
                "TypeError: a Session has connections and cannot be copied or pickled: save its state"
            )


def local_copies() -> dict[str, Any]:
    """Copies of model and optimizer under local steps take steps of their own, say so, and nothing travels for them."""
    model = network()
    optimizer = sgd(model)
    outer = commpress.local_sgd(model, optimizer, "int8", every=1)
    train(model, range(2), optimizer=optimizer)
    sent, got = outer.report().sent_bytes, dict[str, Any]()
    for name, way in WAYS.items():
        before = parameters_of(model)
        twin, of_twin = (model, copy.copy(optimizer)) if name == "copy" else way((model, optimizer))
        _, got[name] = heard(lambda t=twin, o=of_twin: train(t, range(2, 4), optimizer=o))
        with torch.no_grad():
            for p, value in zip(model.parameters(), before, strict=True):
                p.copy_(value)
    assert outer.report().sent_bytes == sent
    _, got["of the original"] = heard(lambda: train(model, range(2, 4), optimizer=optimizer))
    twin, of_twin = copy.deepcopy((model, optimizer))
    of_twin_syncs = commpress.local_sgd(twin, of_twin, "int8", every=1)
    _, got["when it is attached"] = heard(lambda: train(twin, range(4, 6), optimizer=of_twin))
    assert of_twin_syncs.steps == 2
    return {**got, "steps": outer.steps, "parameters": parameters_of(model)}


def test_copies_of_an_optimizer_with_local_steps() -> None:
    one, other = run(2, local_copies)
    assert same(one["parameters"], other["parameters"])
    for rank, got in enumerate((one, other)):
        assert got["steps"] == 4
        for way in WAYS:
            told = ["this SGD is a copy of one that had outer syncs" in text for text in got[way]]
            assert told == [True] * (rank == 0)  # once, from rank 0
        assert got["of the original"] == got["when it is attached"] == []


def shared_memory() -> bool:
    """A model in shared memory is trained as before."""
    ddp = DistributedDataParallel(network())
    commpress.attach(ddp, "none")
    ddp.share_memory()
    plain = DistributedDataParallel(network())
    return same_training(train(ddp, range(2)), train(plain, range(2)))


def test_a_model_in_shared_memory() -> None:
    assert all(run(2, shared_memory))


LOADS = """
import sys, torch, torch.distributed as dist
if sys.argv[2] == "model":
    dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=0, world_size=1)
x = torch.load(sys.argv[1], weights_only=False)
if sys.argv[2] == "model":
    x.eval()(torch.zeros(1, 32))
    torch.nn.functional.mse_loss(x.train()(torch.zeros(4, 32)), torch.zeros(4, 10)).backward()
else:
    assert x.session is None
print("loaded", type(x).__name__)
"""


def written(folder: str) -> None:
    """Rank 0 saves the whole wrapped model, the bare one, and the hook's state."""
    ddp, _ = attached("int4")
    state = CommState("int4")
    if dist.get_rank() == 0:
        for name, what in {"model": ddp, "state": state}.items():
            torch.save(what, f"{folder}/{name}.pt")
    dist.barrier()


@pytest.mark.slow
def test_another_process_loads_what_was_saved(tmp_path: Path) -> None:
    run(2, written, str(tmp_path))
    for name, kind in {"model": "DistributedDataParallel", "state": "CommState"}.items():
        command = [sys.executable, "-c", LOADS, str(tmp_path / f"{name}.pt"), name, str(tmp_path / "store")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert f"loaded {kind}" in done.stdout, done.stderr
        assert (SAYS in done.stderr) == (name == "model")


def in_time(record: bool) -> int:
    """How many forwards and backwards a timeline has after a copy of the model was attached, too."""
    ddp, session = attached("int4")
    duplicate = copy.deepcopy(ddp)
    other = commpress.attach(duplicate, "int4")
    with session.timeline() as spans, other.timeline() as none:
        train(ddp, range(2))
    assert not none.spans
    return sum(span.phase in ("forward", "backward") for span in spans.spans)


def test_a_timeline_is_of_one_module() -> None:
    assert run(2, in_time, True) == [4, 4]


def collected() -> bool:
    """A session ends with its model, copies or not."""
    gc.collect()
    before = threading.active_count()
    ddp, session = attached("int4")
    duplicate = copy.deepcopy(ddp)
    del ddp, session
    gc.collect()
    one_left = threading.active_count() == before
    x: Tensor = torch.zeros(1, 32)
    duplicate.eval()(x)
    return one_left


def test_a_copy_does_not_keep_the_session_alive() -> None:
    assert run(2, collected) == [True, True]
