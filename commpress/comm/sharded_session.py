"""The session of a sharded model: report, state and masks over one or two groups of ranks (`shards.py` does the exchanges)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commpress.comm.agreement import Settings, require_agreement, require_equal
from commpress.comm.codecs import Codec
from commpress.comm.failure import ExchangeError
from commpress.comm.meter import Report
from commpress.comm.plan import Plan
from commpress.comm.rank_state import RankState
from commpress.comm.resize import require_one_run, require_same_values, unreadable
from commpress.comm.session import GradScaler
from commpress.comm.shards import Shards
from commpress.comm.survivors import Survivors, described
from commpress.comm.timeline import Timeline

STATE_VERSION = 2
Memories = list[list[dict[str, Any]]]
"""What `Feedback.state_dict` returns, of each of the shards."""


class ShardedSession:
    """What `commpress.attach` returns for sharded models: report and state over one or two groups of ranks.

    `shards` is the traffic among the ranks that share the parameters, `replicas` that among the owners of the same shard, if
    there are any; `rank` and `world_size` are those of all ranks together. `holds` is what they agreed on, in words.
    `survivors` makes of masks by parameter what each of `shards` needs to know, `reshard` of what feedback kept among another
    number of ranks what it is among these. `values` is how many the model has.
    """

    def __init__(
        self,
        shards: Sequence[Shards],
        gradients: Plan,
        parameters: Plan,
        rank: int,
        world_size: int,
        holds: str,
        grad_scaler: GradScaler | None = None,
        survivors: Callable[[Mapping[str, Tensor]], list[Survivors]] | None = None,
        reshard: Callable[[Memories, int], Memories] | None = None,
        values: int = 0,
    ) -> None:
        self.shards = tuple(shards)
        self._survivors, self._reshard, self._values = survivors, reshard, values
        self.gradients, self.parameters = gradients, parameters
        self.rank, self.world_size = rank, world_size
        self._holds = holds
        self._scaler, self._scale = grad_scaler, 1.0

    def keep(self, masks: Mapping[str, Tensor]) -> None:
        """From the next step on only what these masks keep travels, gradients and parameters, without indices. Collective.

        `masks` are bool, of the whole parameters' shapes, by name, the same on all ranks; a parameter without one travels
        whole. Elsewhere gradients and gathered parameters are 0. Feedback of what they prune is dropped. Call it between
        steps, and before `load_state_dict`. Raises ValueError on all ranks if the ranks' masks differ or one does not fit,
        TypeError if this kind of sharding takes none.
        """
        if self._survivors is None:
            raise TypeError("masks: expected DistributedDataParallel or a model that fully_shard took")
        refusal, survivors = None, []
        try:
            survivors = self._survivors(masks)
        except ValueError as error:
            refusal = str(error)
        for shards in self.shards:  # each hands on what it found: the dimensions of a mesh reach all its ranks
            try:
                require_equal(shards.ask(described(masks, refusal), "a set of masks"))
            except ValueError as error:
                if isinstance(error, ExchangeError):
                    raise
                refusal = refusal or str(error)
        if refusal is not None:
            raise ValueError(refusal)
        for shards, those in zip(self.shards, survivors, strict=True):
            shards.feedback.keep(those)

    def look(self, on: bool) -> None:
        """While on, exact gradients of all values travel, also of those that masks prune: to see which shall grow again."""
        for shards in self.shards:
            shards.looks = on

    def phase(self, name: str) -> None:
        """What the report's rows are called by from now on."""
        for shards in self.shards:
            shards.meter.enter(name)

    def agree(self, settings: Mapping[str, object]) -> None:
        """Raise ValueError on every rank, naming both values, if these (JSON values) differ. Collective."""
        for shards in self.shards:
            require_equal(shards.ask(dict(settings), "settings to compare"))

    def report(self) -> Report:
        """Bytes and seconds so far, on this rank. Gradients and parameters have rows of their own."""
        spec = f"gradients {self.gradients.codec}, parameters {self.parameters.codec}"
        together = Report.together(*(shards.report(spec, self.rank, self.world_size) for shards in self.shards))
        return replace(together, rank=self.rank, world_size=self.world_size)

    @contextlib.contextmanager
    def timeline(self) -> Iterator[Timeline]:
        """Record when what was encoded, sent and decoded while the block runs. Enter and leave it between steps."""
        timeline = Timeline(self.rank)
        for shards in self.shards:
            shards.meter.timeline = timeline
        try:
            yield timeline
        finally:
            for shards in self.shards:
                shards.meter.timeline = None

    def follow_scale(self) -> None:
        """For hooks: a step begins. Memories hold gradients times the loss scale; when that changes they change with it."""
        if self._scaler is not None and (scale := float(self._scaler.get_scale())) != self._scale:
            for shards in self.shards:
                shards.feedback.rescale(scale / self._scale)
            self._scale = scale

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a {type(self).__name__} has connections and cannot be copied or pickled: save its state_dict(), on every rank"
        )

    def state_dict(self) -> dict[str, Any]:
        """What feedback keeps on this rank (every rank saves its own). Call it between steps."""
        content = {
            **self._identity(),
            "step": max((shards.meter.steps for shards in self.shards), default=0),
            "scale": self._scale,
            "memories": [shards.feedback.state_dict() for shards in self.shards],
        }
        return RankState(content, self._values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` saved on the same rank; training goes on bit for bit. Collective, between steps.

        `state` is that dict, or what `torch.distributed.checkpoint` has loaded into one: that is good for any number of ranks
        under FSDP2 without replicas, where what they had withheld is kept in total. Raises on all ranks: ValueError if a state
        belongs to another version, plan, model, rank or number of ranks, or if the ranks' states are not of one step;
        TypeError, on its rank, for the list of all ranks' states, as other sessions take it.
        """
        refusal: Exception | None = None
        mine: list[dict[str, Any]] = []
        said: Settings = {"nothing": True}
        try:
            mine = self._states(state)
            if mine:
                said = {key: mine[0][key] for key in ("version", "world_size", "step", "scale")}
        except Exception as error:  # the other ranks wait for what this one has to say
            refusal = unreadable(error)
            said = {"error": str(refusal)}
        first = said
        for shards in self.shards:  # each hands on what it found: the dimensions of a mesh reach all its ranks
            everyone = shards.ask(said, "a state to restore")
            if refusal is None:
                try:
                    first = require_one_run(everyone)
                except ValueError as error:
                    refusal, said = error, {"error": str(error)}
        if refusal is not None:
            raise refusal
        self._scale = float(str(first["scale"]))
        memories = mine[0]["memories"] if mine else [[] for _ in self.shards]
        if first["world_size"] != self.world_size:
            memories = self._merged([one["memories"] for one in mine], int(str(first["world_size"])))
        for shards, kept in zip(self.shards, memories, strict=True):
            shards.feedback.load_state_dict(kept, shards.device)

    def _states(self, state: Any) -> list[dict[str, Any]]:
        """The saved states that this rank goes on with: its own, or its share of those of another number of ranks."""
        if isinstance(state, RankState) and (rows := state.loaded) is not None:
            found = rows
        elif isinstance(state, Mapping):
            found = [dict(state)]
        else:
            raise TypeError(
                f"expected the dict that this rank saved, got a {type(state).__name__}: a sharded state fits no other rank; "
                "save session.state_dict() on every rank"
            )
        expected = self._identity()
        for one in found:
            if one.get("world_size") != self.world_size and self._reshard is not None and isinstance(state, RankState):
                expected = {key: expected[key] for key in expected if key not in ("rank", "world_size", "groups")}
            require_same_values(expected, one)
        if expected.keys() == self._identity().keys():
            for one in found:
                for shards, kept in zip(self.shards, one["memories"], strict=True):
                    shards.feedback.require_fit(kept)
        elif self._reshard is not None:
            for one in found:
                self._reshard(one["memories"], int(one["world_size"]))  # raises for what it cannot
        return found

    def _merged(self, mine: list[Memories], old: int) -> Memories:
        """This rank's share of what another number of ranks had withheld, as it is sharded now."""
        if not mine:
            return [[] for _ in self.shards]
        assert self._reshard is not None
        resharded = [self._reshard(memories, old) for memories in mine]
        total = resharded[0]
        for other in resharded[1:]:
            for buckets, more in zip(total, other, strict=True):
                for bucket, one in zip(buckets, more, strict=True):
                    if one["residual"] is not None:
                        bucket["residual"] += one["residual"]
        for buckets in total:
            for bucket in buckets:
                if bucket["residual"] is not None:
                    bucket["residual"] *= self.world_size / old
        return total

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "kind": "sharded",
            "gradients": self.gradients.settings(),
            "parameters": self.parameters.settings(),
            "holds": self._holds,
            "rank": self.rank,
            "world_size": self.world_size,
            "groups": [shards.world_size for shards in self.shards],
        }


def plans(gradients: str | Codec, parameters: str | Codec, error_feedback: bool) -> tuple[Plan, Plan]:
    """The plans of gradients and of parameters. Raises ValueError or TypeError for a spec that makes none."""
    made = []
    for name, spec in (("gradients", gradients), ("parameters", parameters)):
        try:
            made.append(Plan.of(spec, None, error_feedback and name == "gradients"))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from None
    if made[1].codec.sparse:
        raise ValueError(
            f"parameters: {made[1].codec} would make most of them 0; expected none, or a codec that sends all values"
        )
    return made[0], made[1]


def agree(
    settings: dict[str, object], groups: Sequence[dist.ProcessGroup], device: torch.device, refusal: Exception | None
) -> None:
    """Raise on every rank what one of them has to say: its refusal, or settings that differ. Collective.

    Each of `groups` compares in turn, and hands on what it found: the dimensions of a mesh reach all its ranks.
    """
    error = refusal
    settings = {**settings, "commpress version": version("commpress")}
    for group in groups:
        try:
            require_agreement(settings if error is None else {"error": str(error)}, group, device)
        except ValueError as found:
            error = error or found
    if error is not None:
        raise error
