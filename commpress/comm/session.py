"""Sessions: the user's handle on the traffic of one model, with report, masks, phases, timeline and state, under every wrapper.

A session knows no framework and sends nothing by itself: its `Collectives` send. The hooks in `commpress.hooks` make it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import Settings, require_equal
from commpress.comm.auto import Auto, budget
from commpress.comm.collectives import Collectives
from commpress.comm.failure import ExchangeError
from commpress.comm.links import LinkCounter
from commpress.comm.masks_index import MaskIndex, described
from commpress.comm.meter import Report
from commpress.comm.optimizer_hooks import OptimizerHooks
from commpress.comm.parameters import bare_name
from commpress.comm.rank_state import RankState
from commpress.comm.receipt import Receipt, receipt
from commpress.comm.resize import (
    Memories,
    empty_memories,
    merged_memories,
    require_one_run,
    require_same_parameters,
    require_same_values,
    share,
    summary,
    unreadable,
)
from commpress.comm.segments import Segments, sizes
from commpress.comm.sharded_auto import ShardedAuto
from commpress.comm.shared_factors import share_factors
from commpress.comm.step_buffer import StepBuffer
from commpress.comm.timeline import Timeline

STATE_VERSION = 5
Masks = Mapping[str, Tensor]


class SideTraffic(Protocol):
    """Other traffic of the same model: the buffers that DDP broadcasts."""

    def report(self) -> Report:
        """Return bytes and seconds so far, on this rank."""

    def phase(self, name: str) -> None:
        """Call the report's rows by this name from now on."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a restart."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class Session:
    """The return value of `commpress.attach`: report, masks and state of a model's traffic in one or several groups of ranks.

    `collectives` send the traffic; `rank` and `world_size` count all ranks together (default: the first group's). `settings`
    must be equal in a saved state and here; `spec` is the name of the traffic in reports. `step_buffer` is given if the ranks
    are replicas; `parameters` then holds the names and sizes of the exchanged parameters. `auto` is given if a spec is searched
    for. `masks` turns masks by parameter into an index for each of the collectives. `reshard` turns the residuals of another
    number of ranks into those of these ranks, after they were added up. `values` is the approximate number of values in the
    model. `holding` says where parameters are stepped, if not in the module (`commpress.model.held.Holding`).
    """

    def __init__(
        self,
        *collectives: Collectives,
        spec: str,
        settings: Settings,
        step_buffer: StepBuffer | None = None,
        auto: Auto | ShardedAuto | None = None,
        parameters: Segments = (),
        rank: int | None = None,
        world_size: int | None = None,
        masks: Callable[[Masks], list[MaskIndex]] | None = None,
        reshard: Callable[[list[Memories], int], list[Memories]] | None = None,
        values: int = 0,
        holding: Any = None,
    ) -> None:
        self.collectives, self.step_buffer = collectives, step_buffer
        first = collectives[0]
        self.device = first.device
        self.group = first.group if len(collectives) == 1 else None
        """The group of the ranks that train the model; None if there are several, which together are the default group."""
        self.rank = first.rank if rank is None else rank
        self.world_size = first.world_size if world_size is None else world_size
        self.side_traffic: list[SideTraffic] = []
        self.holding = holding
        """Where parameters are stepped, for a recipe; None if an optimizer steps the module's own."""
        self._spec, self._settings, self._parameters = spec, settings, parameters
        self._masks, self._reshard, self._values = masks, reshard, values
        self._counter = LinkCounter()
        self._auto = auto
        self._logged: Report | None = None

    @property
    def _optimizer(self) -> OptimizerHooks | None:
        return None if self.step_buffer is None else self.step_buffer.optimizer

    def set_masks(self, masks: Masks) -> None:
        """Send only the values that these masks keep, without indices, from the next step on. Other values arrive as 0.
        Collective.

        `masks` are bool tensors by name, in the whole parameters' shapes (under DDP in their strides, too), the same on all
        ranks. A parameter without a mask is sent whole. The residual of pruned values is dropped. Call it between steps, and
        before `load_state_dict`. Raises ValueError on all ranks if the ranks' masks differ or one does not fit, or for an
        optimizer that keeps a momentum of what is sent; TypeError if this kind of sharding takes no masks.
        """
        if self._masks is None:
            raise TypeError("masks: expected DistributedDataParallel, a model that fully_shard took, or DeepSpeed")
        refusal: str | None = None
        found: list[MaskIndex] = []
        masks = {bare_name(name): mask for name, mask in masks.items()}
        try:
            found = self._masks(masks)
        except ValueError as error:
            refusal = str(error)
        for collectives in self.collectives:  # each passes its result on, so it reaches all ranks of a mesh
            try:
                require_equal(collectives.traffic.ask(described(masks, refusal), "a set of masks"))
            except ValueError as error:
                if isinstance(error, ExchangeError):
                    raise
                if len(self.collectives) == 1:
                    raise
                refusal = refusal or str(error)
        if refusal is not None:
            raise ValueError(refusal)
        if self.step_buffer is not None:
            self.step_buffer.forget_skipped_step()
        for collectives, index in zip(self.collectives, found, strict=True):
            collectives.feedback.set_masks(index)
            collectives.versions.clear()

    def send_dense(self, on: bool) -> None:
        """Send the exact gradients of all values while `on`, also of pruned ones: they show which weights should regrow.
        Raises ValueError if an optimizer's own values are sent in place of gradients."""
        for collectives in self.collectives:
            collectives.set_dense(on)

    def phase(self, name: str) -> None:
        """Call the report's rows by this name from now on."""
        if self._auto is not None and name != self.collectives[0].meter.phase:
            self._auto.search.expect_another_loss()
        for collectives in self.collectives:
            collectives.meter.enter(name)
        for other in self.side_traffic:
            other.phase(name)

    def agree(self, settings: Mapping[str, object], what: str = "settings to compare") -> None:
        """Raise ValueError on every rank, with both values, if these JSON values differ. Collective.

        `what` names them in the error if another rank compares something else.
        """
        for collectives in self.collectives:
            require_equal(collectives.traffic.ask(dict(settings), what))

    def note_loss(self, loss: float | Tensor) -> None:
        """Tell `auto` the loss of a step, or of a backward, on this rank: a number, or a tensor with one value.

        It is not waited for: the ranks compare their means when they compare how long steps take. If the loss is not finite in
        two comparisons, or has risen far above its running mean, all ranks change to a gentler spec. Ranks may leave it out.
        Does nothing if a spec was given. Raises ValueError for a tensor of several values.
        """
        if self._auto is None:
            return
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                shape = [*loss.shape]
                raise ValueError(f"note_loss: expected a number or a tensor with one value, got one of shape {shape}")
            loss = loss.detach().reshape(()).to(torch.float32)
        self._auto.search.note_loss(loss)

    def explain(self) -> str:
        """Return a table of the specs that `auto` has tried, their predicted and measured steps, and its choice.

        Returns a sentence instead if a spec was given.
        """
        return f"the spec was given: {self._spec}" if self._auto is None else self._auto.explain()

    def receipt(self) -> Receipt:
        """Return whether compression has paid so far: a step with it against one without it, on this rank."""
        counted, auto = self._counter.sent(), self._auto
        if auto is None:
            return receipt(self.report(), None, self._spec, counted, None)
        whole = budget(self._spec) is not None
        choice, spec = auto.search.choice, self._spec
        if choice is not None:
            spec = choice.spec if whole else f"{spec} ({choice.spec})"
        return receipt(self.report(), choice, spec, counted, auto.break_even() if whole else None, whole, True)

    def report(self) -> Report:
        """Return bytes and seconds so far, on this rank, and what `auto` has chosen. Gradients and parameters have separate
        rows."""
        spec = (
            self._spec
            if self._auto is None
            else self._auto.spec
            if budget(self._spec) is not None
            else f"{self._spec}; {self._auto.spec}"
        )
        own = (one.traffic.report(spec, self.rank, self.world_size) for one in self.collectives)
        merged = Report.merge(*own, *(other.report() for other in self.side_traffic))
        choices = (
            [] if self._auto is None else [replace(one) for one in self._auto.search.choices]
        )  # they may change later
        return replace(merged, rank=self.rank, world_size=self.world_size, choices=choices)

    def log(self) -> dict[str, float]:
        """Return numbers for a tracker, as in `wandb.log(session.log())`: means of a step since the last call
        (`Report.log`)."""
        report = self.report()
        if found := report.log(self._logged):
            self._logged = report
        return found

    def _repr_html_(self) -> str:
        return f"{self.report()._repr_html_()}\n{self.receipt()._repr_html_()}"

    @contextlib.contextmanager
    def timeline(self) -> Iterator[Timeline]:
        """Record what happens when, while the block runs: `with session.timeline() as t: ...; t.write("trace.json")`.

        Enter and leave the block between steps.
        """
        timeline = Timeline(self.rank)
        for collectives in self.collectives:
            collectives.meter.timeline = timeline
        if self.step_buffer is not None:
            self.step_buffer.timeline_starts()
        try:
            yield timeline
        finally:
            for collectives in self.collectives:
                collectives.meter.timeline = None

    def follow_scale(self) -> None:
        """Begin a step: scale the residual as the loss scale has changed. For hooks."""
        for collectives in self.collectives:
            collectives.follow_scale()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a {type(self).__name__} has connections and cannot be copied or pickled: save its state_dict(), on every rank"
        )

    # state

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's residuals and their layout, and what `auto` knows of the run. Every rank saves its own. Call it
        between steps.

        DDP rebuilds its buckets between its first and its second step. A state that is saved between them continues with the
        first layout: nothing is lost, but the run does not continue bit for bit.
        """
        if self.step_buffer is not None:
            self.step_buffer.forget_skipped_step()
        optimizer = self._optimizer
        steps = (one.meter.steps for one in self.collectives)
        content = {
            **self._identity(),
            "step": max(steps) if self.step_buffer is None else self.step_buffer.step_of_run,
            "scale": self.collectives[0].scale,
            "optimizer": None if optimizer is None else optimizer.own_state(),
            "memories": [collectives.feedback.state_dict() for collectives in self.collectives],
            "versions": [collectives.versions.state_dict() for collectives in self.collectives],
            "side traffic": [other.state_dict() for other in self.side_traffic],
        }
        if self._auto is not None:
            content["search"] = self._auto.kept()
        shared = None if optimizer is None else optimizer.state_dict()
        return RankState(content, self._values or sum(sizes(self._parameters)), shared)

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Restore what `state_dict` saved on the same rank; training continues bit for bit. Collective, between steps.

        `state` is that dict, or a state that `torch.distributed.checkpoint` has loaded. The latter fits any number of ranks, of
        replicas and of shards under FSDP2 without replicas; the sum of the residuals is kept. For replicas a sequence of the
        states of all ranks does the same. If you load by hand, load a compressed optimizer's state first; a distributed
        checkpoint holds it with the session's. DDP rebuilds its buckets after a restart; the first step is exchanged in the
        saved layout.

        Raises ValueError on all ranks if a state belongs to another version, plan, rank, number of ranks or model, or if the
        ranks' states are not of one step; TypeError on its own rank for an object that is no state.
        """
        refusal: Exception | None = None
        mine: list[dict[str, Any]] = []
        said: Settings = {"nothing": True}
        try:
            mine = self._states(state)
            said = [*map(summary, mine), said][0]
        except Exception as error:  # the other ranks wait for this one's answer
            refusal = unreadable(error)
            said = {"error": str(refusal)}
        first = said
        for collectives in self.collectives:  # each passes its result on, so it reaches all ranks of a mesh
            everyone = collectives.traffic.ask(said, "a state to restore")
            if refusal is None:
                try:
                    first = require_one_run(everyone)
                except ValueError as error:
                    refusal, said = error, {"error": str(error)}
        if refusal is not None:
            raise refusal
        optimizer = self._optimizer
        if optimizer is not None and isinstance(state, RankState) and state.loaded_shared is not None:
            optimizer.load_with_session(state.loaded_shared)
        old = int(str(first["world_size"]))
        if old == self.world_size:
            self.restore(mine[0])
            return
        assert self._reshard is not None
        kept = [one["memories"] for one in mine]
        if not kept and self.step_buffer is not None:  # the next step has the saved layout on all ranks
            kept = [empty_memories(first)]
        memories = merged_memories([self._reshard(one, old) for one in kept], self.world_size / old)
        memories = memories or [[] for _ in self.collectives]
        layouts: Any = first["layouts"]
        if any(bucket.get("factors") for buckets in layouts for bucket in buckets):
            share_factors(memories, self.collectives[0].group, self.device)
        own = self._mean_of_own([one["optimizer"] for one in mine], old)
        self.restore({**first, "memories": memories, "optimizer": own, "versions": [], "side traffic": []})

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from this rank's state, which must fit; all ranks do so. Not collective."""
        versions = state.get("versions") or [()] * len(self.collectives)
        for collectives, memories, known in zip(self.collectives, state["memories"], versions, strict=True):
            collectives.scale = float(state["scale"])
            collectives.feedback.load_state_dict(memories, collectives.device)
            collectives.versions.load_state_dict(known, collectives.feedback.masks, collectives.device)
        if self.step_buffer is not None:
            self.step_buffer.resume(int(state["step"]))
        if self._optimizer is not None and state["optimizer"] is not None:
            self._optimizer.load_own_state(state["optimizer"])
        for other, saved in zip(self.side_traffic, state["side traffic"], strict=False):
            other.load_state_dict(saved)
        if self._auto is not None and "search" in state:
            self._auto.restore(state["search"])

    def require_own(self, state: dict[str, Any]) -> None:
        """Raise ValueError if a state belongs to another version, plan, rank, number of ranks or model."""
        require_same_values(self._identity(), state)
        self._require_fit(state, state["memories"])

    def _states(self, state: Any) -> list[dict[str, Any]]:
        """Return the saved states from which this rank continues: its own, or its share of another number of ranks' states."""
        if isinstance(state, RankState) and (rows := state.loaded) is not None:
            found = rows
        elif isinstance(state, Mapping):
            found = [dict(state)]
            self.require_own(found[0])
        elif self.step_buffer is not None and isinstance(state, Sequence) and not isinstance(state, str):
            found = share(state, self.rank, self.world_size)
        else:
            raise TypeError(
                f"expected the dict that this rank saved, got a {type(state).__name__}: save session.state_dict() on every rank"
            )
        for one in found:
            if one.get("world_size") == self.world_size or self._reshard is None:
                self.require_own(one)
                continue
            of_rank = ("rank", "world_size", "groups")
            require_same_values({k: v for k, v in self._identity().items() if k not in of_rank}, one)
            self._require_fit(one, self._reshard(one["memories"], int(one["world_size"])))
        return found

    def _require_fit(self, state: dict[str, Any], memories: list[Memories]) -> None:
        """Raise ValueError if a state's memories are not of this session's parameters, or not of the values that masks keep."""
        saved = {bare_name(name): int(n) for kept in memories for bucket in kept for name, n in bucket["segments"]}
        if self._parameters and saved:
            replicas = self.step_buffer is not None  # shards that were never exchanged have no memory
            present = {part.name: part.n for part in self._parameters if replicas or part.name in saved}
            require_same_parameters(saved, present)
        for collectives, kept in zip(self.collectives, memories, strict=True):
            collectives.feedback.require_fit(kept)

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            **self._settings,
            "rank": self.rank,
            "world_size": self.world_size,
            "groups": [collectives.world_size for collectives in self.collectives],
        }

    def _mean_of_own(self, mine: list[Any], saved: int) -> Any:
        """Return the mean, over all ranks that have saved, of the state that an optimizer has on each rank. Collective."""
        if self._optimizer is None:
            return None
        mean = self._optimizer.own_state()
        for name, kept in mean.items():
            for key in kept:
                total = torch.zeros_like(kept[key])
                for one in mine:
                    total += one[name][key].to(total.device)
                dist.all_reduce(total, group=self.collectives[0].group)
                kept[key] = total / saved
        return mean
