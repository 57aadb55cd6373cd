"""`auto`: finds the spec of the gradients during training, and chooses no spec whose steps take longer than those of `none`.

The first steps have the bits of plain training. They show the speed of the link. With the codecs' speed on this machine it
ranks the specs; the best two and `none` are then tried in turns, and the measured medians decide (`search.py`). Only specs that
keep the loss under any optimizer are tried. In a turn of `none` the exact mean contains the residual. Now and then the error of
a step and the residual are measured: if a spec hurts (`guard.py`), all ranks change to a gentler one.

The size of what is sent at once is chosen, too: whole buckets, or `int4 in 4 MB`, pieces of about 4 MB of them. Small pieces
are sent sooner, but each costs the codec and the link something. Pieces only meet the chosen spec, in a duel (`duel.py`).
"""

import re
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from commpress.comm import cost
from commpress.comm.choice import HEAD, IN_PIECES, PIECE, Choice, history, warn_of, without_pieces
from commpress.comm.codecs import AUTO, Codec, parse
from commpress.comm.coding import FLOAT_DTYPES, warm_up
from commpress.comm.cost import Cluster, Speed, Transfer, transfers
from commpress.comm.error import ErrorWatch
from commpress.comm.guard import BUDGET
from commpress.comm.links import Counted, LinkCounter, Links
from commpress.comm.parts import pieces
from commpress.comm.plain_steps import Part, PlainSteps, slowest_ready, told
from commpress.comm.plan import Override, Plan
from commpress.comm.question import Question
from commpress.comm.said import Said
from commpress.comm.search import PLAIN, Search
from commpress.comm.segments import Segments
from commpress.comm.speed import measure
from commpress.kernels.cpu.slices import cores

if TYPE_CHECKING:
    from commpress.comm.collectives import Collectives

SPECS = (PLAIN, "bf16", "int8", "int4")
"""The specs that `auto` may choose, the gentlest first."""
TIMED = 2**20
"""The number of values with which a codec is timed when a session is made."""
UNSEEN = (
    "Predicted from what the host sees, which on an accelerator is not how long exchanges take: the codecs' seconds decide "
    "which specs are tried. Which one of those is chosen is measured.\n"
)
_WORDS = re.compile(rf"{AUTO}(?:\(\s*error\s*=\s*([^()]*?)\s*\))?")
_LIKE = re.compile(rf"\s*{AUTO}\b.*", re.DOTALL)


def budget(spec: object) -> float | None:
    """Return the error that `auto`, or `auto(error=0.2)`, allows a spec; None for anything but `auto`.

    Raises ValueError for an error that is not a number above 0, and for other text that begins with `auto`.
    """
    if not isinstance(spec, str) or _LIKE.fullmatch(spec) is None:
        return None
    match = _WORDS.fullmatch(spec)
    if match is None:
        raise ValueError(f"spec {spec!r}: expected auto or auto(error={BUDGET:g})")
    given = match[1]
    try:
        found = BUDGET if given is None else float(given)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ValueError(f"spec {spec!r}: expected an error above 0, a share of the mean, as in auto(error={BUDGET:g})")
    return found


@lru_cache(maxsize=8)
def speeds(device: torch.device, specs: tuple[str, ...]) -> dict[str, Speed]:
    """Return the seconds a value of each spec on one core of this machine, or on its accelerator; measured once per process."""
    return {spec: measure(parse(spec), device, TIMED) for spec in specs}


def compile_loops(device: torch.device, dtypes: Collection[torch.dtype]) -> None:
    """Compile the loops of each spec for gradients of these dtypes now, not in the middle of training."""
    for dtype in (dtype for dtype in FLOAT_DTYPES if dtype in dtypes):
        for spec in SPECS:
            warm_up(parse(spec), device, dtype)


@dataclass(frozen=True)
class _Model:
    """The figures behind a prediction: the values of each bucket, and of the pieces of each, when each bucket is ready (empty
    if not known), the codecs' speeds, the cluster, the seconds of computation in a step, and the bytes of a value."""

    buckets: list[int]
    pieces: list[list[int]]
    ready: list[float]
    speeds: dict[str, Speed]
    cluster: Cluster
    compute: float
    itemsize: int

    def exchanges(self, name: str) -> tuple[list[int], list[float]]:
        """Return the values of each exchange of a step by this candidate, and when it is ready."""
        if not name.endswith(IN_PIECES):
            return self.buckets, self.ready
        ready = [at for pieces, at in zip(self.pieces, self.ready, strict=False) for _ in pieces]
        return [n for pieces in self.pieces for n in pieces], ready


class Auto:
    """The choice of the plan for the gradients of one set of replicas, step by step. `error_feedback` is as in `attach`.

    `budget` is the error that a spec may have: |mean - dense mean| / |dense mean|. `specs` are the candidates, the gentlest
    first, which is `none`. `may_cut` says whether buckets may be sent in pieces. Collective.
    """

    def __init__(
        self,
        collectives: "Collectives",
        error_feedback: bool,
        budget: float = BUDGET,
        specs: tuple[str, ...] = SPECS,
        may_cut: bool = False,
    ) -> None:
        self._collectives = collectives
        self._plans: dict[str, Plan] = {}
        for spec in specs:  # the gentlest first
            plan = Plan.of(spec, None, error_feedback)
            self._plans |= {spec: plan} | ({spec + IN_PIECES: plan} if may_cut and spec != PLAIN else {})
        self._speeds = speeds(collectives.device, specs) if collectives.world_size > 1 else {}
        self._counter = LinkCounter()
        self._links = Links.measured(collectives.traffic.wire) if collectives.world_size > 1 else Links()
        self.search = Search(self._predicted, budget, codec=without_pieces)
        self._began: float | None = None
        self._busy = 0.0
        """The seconds in which an exchange was running, before this step."""
        self._asked = 0.0
        """Seconds that the last comparison of the ranks took on this rank."""
        self._question: Question | None = None
        """The question by which the ranks exchange their figures in the present step; None in most steps."""
        self.watch: ErrorWatch | None = None
        """The watch that measures the error of the present step; None if it is not measured."""
        self._plain = PlainSteps()
        self._mark = (0, 0.0, 0.0)
        self._model: _Model | None = None
        """The last prediction; None before the first one."""

    @property
    def spec(self) -> str:
        """Return the spec for the report: the chosen one, or the one on trial before the first choice."""
        return f"{AUTO}: {self.search.named}" + ("" if self.search.choice else ", still looking")

    def kept(self) -> dict[str, Any]:
        """Return what a run that goes on needs to know of the search. Call it between steps."""
        return self.search.kept(self._began is not None)

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Continue from what `kept` returned. Call it between steps."""
        self.search.restore(kept, self._began is not None)

    def begin_step(self) -> None:
        """Set the plan of this step; its first bucket has come. The ranks send their figures in one step and choose in the next
        step, from all figures, so no rank waits here for the others."""
        collectives, now = self._collectives, time.perf_counter()
        if collectives.world_size == 1:
            self.search.steps += self._began is not None  # a run that goes on with more ranks needs the number
            self._began = now
            return
        error, residual = (None, None) if self.watch is None else (self.watch.error(), self.watch.residual())
        chosen: list[Choice] = []
        if self._question is not None:
            choices = len(self.search.choices)
            question, self._question = self._question, None
            self.search.compare(question.answers())
            self._begin_turn()
            chosen = self.search.choices[choices:]
            self._asked += time.perf_counter() - now
        elif self._began is not None:
            warms_up = self.search.state == "warm up"
            if self.search.state == "plain":
                self._plain.end_step()
            if self.search.note(now - self._began, error, residual, self._exchanged()):
                self._question = collectives.traffic.send_question(self._said(), "how long the steps took")
                self._asked = time.perf_counter() - now
            elif warms_up:
                self._begin_turn()
        plan = self._plans[self.search.spec]
        collectives.gradients = plan
        self.watch = ErrorWatch(plan.codec) if self.search.checks else None
        self._busy = collectives.traffic.spent("gradients")[1]
        self._plain.begin_step()
        self._began = time.perf_counter()
        warn_of(chosen, collectives.rank == 0)  # last: a warning may be an error

    def note_bucket(self, parts: Sequence[tuple[Segments, Codec | None]], itemsize: int) -> None:
        """Note a bucket of this step that is sent now: its parts, each with its rule's codec, or None where `auto` decides, and
        the bytes of one of its values."""
        collectives = self._collectives
        if self.search.state != "plain" or self._question is not None or collectives.send_dense:
            return
        values = collectives.feedback.masks.total
        self._plain.note([Part(segments, values(segments), itemsize, codec) for segments, codec in parts])

    def cut(self, segments: Segments, itemsize: int) -> list[Segments]:
        """Return the pieces in which a bucket of this step is sent."""
        return pieces(segments, PIECE // itemsize) if self.search.spec.endswith(IN_PIECES) else [segments]

    def explain(self) -> str:
        """Return the specs that were tried last, and their steps, as a table; then what the links do, and when buckets are
        ready."""
        table = explained(self.search, self._collectives.world_size, self._collectives.traffic.on_host)
        if not self.search.choices:
            return table
        return f"{table}{self._links}{'' if self._model is None else told(self._model.ready)}"

    def break_even(self) -> tuple[str, float] | None:
        """Return the choice and the bytes a second of a link above which `none` is predicted to be faster than it. If `none` is
        the choice, return the spec that is predicted to pay first on slower links: at most below this link's bandwidth."""
        choice, model = self.search.choice, self._model
        if choice is None or model is None or model.cluster.ranks_per_host >= model.cluster.world_size:
            return None  # there is no link between hosts
        if choice.spec != PLAIN:
            found = self._break_even_of(choice.spec)
            return None if found is None else (choice.spec, max(found, model.cluster.bandwidth))  # it was measured here
        others = [t for t in choice.trials if t.spec != PLAIN and self.search.codec(t.spec) == t.spec and not t.hurt]
        found_by = {t.spec: at for t in others if (at := self._break_even_of(t.spec)) is not None}
        first = max(found_by, key=found_by.__getitem__, default=None)
        return None if first is None else (first, min(found_by[first], model.cluster.bandwidth))

    def _break_even_of(self, name: str) -> float | None:
        """Return the bytes a second of a link on which a candidate is predicted to take as long as `none`, by the last model,
        which must exist; None if the model does not fit."""
        assert self._model is not None
        cluster = self._model.cluster

        def gain(bandwidth: float) -> float:
            there = replace(cluster, bandwidth=bandwidth)
            return self._step_seconds(PLAIN, there) - self._step_seconds(name, there)

        return cost.end_of(gain)

    # the figures that the ranks exchange

    def _begin_turn(self) -> None:
        """Begin to count the seconds and the link's bytes of a turn."""
        self._mark = self._totals()
        self._counter.start()
        self._plain.clear()

    def _totals(self) -> tuple[int, float, float]:
        return self.search.steps, *self._collectives.traffic.spent("gradients")

    def _said(self) -> dict[str, object]:
        said: dict[str, object] = {**self.search.said(), "asked": self._asked}
        if self.search.state == "plain":
            (before, *then), (after, *now) = self._mark, self._totals()
            steps = max(1, after - before)
            exposed, busy = ((b - a) / steps for a, b in zip(then, now, strict=True))
            said |= {
                "exposed": exposed,
                "busy": busy,
                "cores": self._cores(),
                "ranks here": self._ranks_here(),
                # on an accelerator the host only sees when a bucket was enqueued
                "ready": self._plain.ready() if self._collectives.traffic.on_host else [],
                "link": self._counter.rates() if self._collectives.traffic.wire.by_message else None,
                "speeds": {spec: asdict(speed) for spec, speed in self._speeds.items()},
            }
        return said

    def _exchanged(self) -> float | None:
        """Return the seconds in which an exchange of this step was running; None on an accelerator, where the host does not see
        them."""
        if not self._collectives.traffic.on_host:
            return None
        return self._collectives.traffic.spent("gradients")[1] - self._busy

    def _ranks_here(self) -> int:
        hosts = self._collectives.traffic.wire.board.hosts
        return hosts.count(hosts[self._collectives.rank])

    def _cores(self) -> float:
        if not self._collectives.traffic.on_host:
            return float("inf")
        return max(1.0, cores() / self._ranks_here())

    def _predicted(self, everyone: Sequence[Said], plain: float) -> Mapping[str, float]:
        """Return the predicted seconds of a step by spec: the model's, scaled so that it is right for the plain step."""
        W, found = self._collectives.world_size, [_Told(said) for said in everyone]
        parts = self._plain.parts()
        own = [(i, part) for i, part in parts if part.codec is None]
        if not own:
            return {PLAIN: plain}
        # hosts may have different numbers of ranks: all ranks predict from one figure
        ranks_per_host = max(one.ranks_here for one in found)
        of_auto, by_rules = (
            [m for _, part in parts if (part.codec is None) == mine for m in self._messages(part, ranks_per_host)]
            for mine in (True, False)
        )
        sent = of_auto + by_rules
        busy = statistics.fmean(one.busy for one in found)
        crossing, moved = sum(m.crossing for m in sent) * cost.FRAME, _moved(sent)
        latency = self._links.latency
        moving = max(busy / 2, busy - latency * sum(m.rounds for m in sent if m.crossing))
        cluster = Cluster(
            W,
            bandwidth=crossing / moving if crossing and moving else cost.FASTEST,
            latency=latency,
            ranks_per_host=ranks_per_host,
            cores=min(one.cores for one in found),
            stack=0.0 if crossing else busy / max(1, moved),
            lines=self._collectives.traffic.on_host,
        )
        slowest = {
            spec: max((one.speeds[spec] for one in found), key=lambda speed: speed.encode) for spec in self._speeds
        }
        # the slowest rank waits least, and the wait for what rules send stays whatever auto chooses: both count as computation
        exposed = min(one.exposed for one in found) * _moved(of_auto) / max(1, moved)
        compute = max(0.0, plain - exposed)
        at = slowest_ready([one.ready for one in found], len(self._plain), compute)
        self._model = _Model(
            [part.values for _, part in own],
            [self._piece_values(part) for _, part in own],
            [at[i] for i, _ in own] if at else [],
            slowest,
            cluster,
            compute,
            max(part.itemsize for _, part in own),
        )
        self._links = self._links.with_load([one.link for one in found], crossing / plain)
        seconds = {spec: self._step_seconds(spec, cluster) for spec in self._plans}
        if all(len(of) == 1 for of in self._model.pieces):  # nothing to cut
            seconds = {name: of for name, of in seconds.items() if not name.endswith(IN_PIECES)}
        return {spec: plain * of / seconds[PLAIN] for spec, of in seconds.items()}

    def _messages(self, part: Part, ranks_per_host: int) -> tuple[Transfer, ...]:
        """Return the messages of a part of a bucket in a plain step."""
        W, n, itemsize = self._collectives.world_size, part.values, part.itemsize
        override = None if part.codec is None else Override(part.codec)
        choice = self._plans[PLAIN].choose(n, itemsize, W, override, part.segments)
        return transfers(choice, n, itemsize, W, 0, ranks_per_host)

    def _piece_values(self, part: Part) -> list[int]:
        """Return the values of the pieces of a bucket; those that masks leave empty are not sent."""
        masks = self._collectives.feedback.masks
        return [n for piece in pieces(part.segments, PIECE // part.itemsize) if (n := masks.total(piece))]

    def _step_seconds(self, name: str, cluster: Cluster) -> float:
        """Return the seconds of a step by the last model, which must exist, on a cluster."""
        assert self._model is not None
        model, speed = self._model, self._model.speeds[without_pieces(name)]
        values, ready = model.exchanges(name)
        values, cluster, ready = cost.joined(values, cluster, ready)
        return cost.step(self._plans[name], values, speed, cluster, model.compute, model.itemsize, ready).seconds


def _moved(messages: Sequence[Transfer]) -> int:
    """Return the bytes that a rank sends and receives by these messages."""
    return sum(m.sent + m.received for m in messages)


class _Told:
    """The figures that one rank has sent to the others at the end of the plain steps."""

    def __init__(self, said: Said) -> None:
        self.busy, self.exposed, self.cores = (float(str(said[key])) for key in ("busy", "exposed", "cores"))
        self.ranks_here = int(str(said["ranks here"]))
        self.link: Counted = said["link"]  # type: ignore[assignment]
        self.ready: list[float] = said["ready"]  # type: ignore[assignment]
        rows = said["speeds"]
        assert isinstance(rows, Mapping)
        self.speeds = {
            spec: Speed(row["encode"], tuple(row["mean"]), tuple(row["recode"]), row["add"])
            for spec, row in rows.items()
        }


def explained(search: Search, world_size: int, on_host: bool) -> str:
    """Return the specs of the last search, and their steps, as a table; a sentence if there is none yet."""
    if world_size == 1:
        return "one rank: nothing to send, so nothing to choose"
    if not search.choices:
        return f"after {search.steps} steps the choice is still open"
    choice = search.choices[-1]
    table = Table(
        title=f"auto: {choice.spec}, chosen after {choice.step} steps",
        caption=f"choices so far: {history(search.choices)}",
    )
    for name in HEAD:
        table.add_column(name, justify="right" if name not in ("spec", "") else "left")
    for cells in choice.rows():
        table.add_row(*cells)
    text = StringIO()
    Console(file=text, width=100).print(table)
    return text.getvalue() + ("" if on_host else UNSEEN)
