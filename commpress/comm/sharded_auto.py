"""`auto` for sharded parameters (FSDP2, ZeRO 1 to 3): one search for the spec of gradients and, if wanted, of parameters.

    forward: gathers | backward: gathers, reductions | optimizer | forward ...
    ^ a step begins: both specs change                           ^ the next step begins
    [the ranks' figures] are queued with the traffic             ^ the figures are read

A candidate is a pair of specs, such as `int4, parameters int8`; with `none` nothing is compressed. If shards have replicas, the
ranks exchange their figures among the shards first, and a step later among the replicas, so that all have the same ones. No
rank waits for this (`question.py`): one rank may be in its forward while another is in a collective of the user's own.

Where an optimizer steps whole matrices of sharded parameters (EF21Muon), the spec of its moves is searched for instead of that
of gradients.

Training waits for each exchange when it has started it. So the model that ranks candidates is a sum: for each role, the seconds
of waiting shrink with the bytes, and the codec's seconds are added. (On an accelerator the host does not see the waiting; there
only the measured step times decide.) No rank holds a whole sharded mean, so no error is measured.
"""

import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from math import prod
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from commpress.comm.auto import SPECS, budget, compile_loops, explained, speeds
from commpress.comm.choice import warn_of
from commpress.comm.codecs import AUTO, Codec, parse
from commpress.comm.cost import Speed, transfers
from commpress.comm.exchange.reduce_scatter import native_times
from commpress.comm.plan import Plan
from commpress.comm.question import ROOM, Question
from commpress.comm.rules import Spec
from commpress.comm.said import Said
from commpress.comm.search import PLAIN, Search

if TYPE_CHECKING:
    from commpress.comm.collectives import Collectives

PARAMETER_SPECS = (PLAIN, "bf16", "int8")
"""The specs of parameters that `auto` may choose: those that keep the loss. With `int4` a GPT's loss was 3.6 % higher."""
LEAST = 0.01
"""The shortest predicted step, as a share of a plain one."""
PATIENCE = 8
"""The most forwards by which a step is delayed for outstanding backwards; some outputs are never used."""


def decides(gradients: Spec, parameters: str | Codec | None) -> tuple[bool, bool]:
    """Return whether `auto` decides for gradients that are sharded, and for parameters. Raises ValueError where it cannot."""
    found = []
    for role, spec in (("gradients", gradients), ("parameters", parameters)):
        found.append(budget(spec) is not None)
        if found[-1] and spec != AUTO:
            raise ValueError(
                f"{role}: {spec}: the error of sharded means is not measured; expected auto without a budget"
            )
    if found == [False, True]:
        raise ValueError(
            f"parameters: auto beside gradients by {gradients}: one search decides for both; expected "
            "auto for the gradients, too, or a spec of the parameters, such as 'int8'"
        )
    return found[0], found[1]


class Moves(Protocol):
    """The traffic between the ranks that hold rows of matrices and the owners that step them."""

    specs: tuple[str, ...]
    """The specs that `auto` may choose, the gentlest first."""
    back: str
    """The spec of what comes back, if what is sent is coded."""
    values: int
    """The number of values of all matrices."""

    def take(self, codec: Codec) -> None:
        """Send by this codec from now on."""


class ShardedAuto:
    """The choice of the plans of a sharded model's traffic, step by step. `error_feedback` is as in `attach`.

    `steered` are the collectives whose plans change. `compared` are this rank's: first those of the shards, which gather the
    parameters, then those of the replicas, if there are any. The last of them compress the gradients. `parameters` says whether
    a spec of the parameters is searched for, too; `dtypes` are those of the exchanged tensors. If there are
    `moves`, their spec is searched for, and the plan of the gradients stays. `begin_step` is called at the same place on every
    rank, and waits for no other rank.
    """

    def __init__(
        self,
        steered: Sequence["Collectives"],
        compared: Sequence["Collectives"],
        error_feedback: bool,
        parameters: bool = False,
        dtypes: Collection[torch.dtype] = (),
        moves: Moves | None = None,
    ) -> None:
        self._steered, self._compared, self._moves = steered, compared, moves
        self._role = "gradients" if moves is None else "updates"
        """The role of the traffic whose spec is searched for, in the report."""
        specs = SPECS if moves is None else moves.specs
        self.world_size = prod(one.world_size for one in compared)
        self._plans = {
            self._role: {spec: Plan.of(spec, None, error_feedback) for spec in specs},
            "parameters": {spec: Plan.of(spec) for spec in PARAMETER_SPECS if parameters},
        }
        # the gentlest first, as a search wants them
        self._pairs = {_named(spec, other): (spec, other) for other in PARAMETER_SPECS for spec in specs}
        if not parameters:
            self._pairs = {spec: (spec, PLAIN) for spec in specs}
        timed = specs if moves is None else tuple(dict.fromkeys((*specs, moves.back)))
        self._speeds = speeds(compared[0].device, timed) if self.world_size > 1 else {}
        if self.world_size > 1 and moves is None:
            compile_loops(compared[0].device, dtypes)
        self.search = Search(self._predicted)
        self.due = True
        """Whether the next forward begins a step: gradients were reduced, or parameters stepped, since the last one began."""
        self.outstanding: set[object] = set()
        """A token for each forward of this step whose backward has not begun; the backward needs the forward's parameters."""
        self._put_off = 0
        self._began: float | None = None
        self._asked = 0.0
        self._asks = [one for one in compared if one.world_size > 1]
        """The groups in which the ranks exchange their figures, one after another."""
        self._questions: list[Question] = []
        """The questions of the steps before, one for each group so far; empty in most steps."""
        self._noted: Counter[tuple[str, int, int]] = Counter()
        """The number of this step's exchanges by role, values and bytes a value."""
        self._waited = dict.fromkeys(self._plans, 0.0)
        """Seconds that training waited for the framework's own exchanges, by role."""
        self._evaluates_from: tuple[float, ...] | None = None
        """The seconds that were waited, by role, when the present forward began, if it trains nothing; else None."""
        self._left_out = (0.0, 0.0)
        """The seconds of waiting, by role, in forwards that train nothing."""
        self._gathered = False
        """Whether a forward that trains nothing has gathered parameters which the next one may find gathered."""
        self._spared = False
        """Whether this step has found such parameters: it gathers less, and takes less time, than others."""
        self._passed_over = False
        """Whether the last step was not counted for that."""
        self._mark = self._totals()
        self._start = self._totals()
        """The totals before this step."""

    @property
    def spec(self) -> str:
        """The name of the traffic in a report: the chosen candidate; before the first choice, the present one."""
        return f"{AUTO}: {self.search.named}" + ("" if self.search.choice else ", still looking")

    def kept(self) -> dict[str, Any]:
        """Return what a run that goes on needs to know of the search. Call it between steps."""
        return self.search.kept(self._began is not None)

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Continue from what `kept` returned. Call it between steps."""
        self.search.restore(kept, self._began is not None)

    def begin_step(self) -> None:
        """Set the plans of a step, whose first forward begins. The ranks' figures of one step are read in the next, and then
        sent on to the replicas, if there are any."""
        self.due, self._put_off = False, 0
        self.outstanding.clear()
        now, choices = time.perf_counter(), len(self.search.choices)
        if self.world_size == 1:
            self.search.steps += self._began is not None  # a run that goes on with more ranks needs the number
            self._began = now
            return
        if self._questions:
            rows = [row for told in self._questions[-1].answers() for row in told["rows"]]  # type: ignore[attr-defined]
            if len(self._questions) < len(self._asks):
                self.search.steps += 1
                self._ask(rows)
            else:
                self._questions.clear()
                self.search.compare(rows)
                self._mark = self._totals()
            self._asked += time.perf_counter() - now
        elif self._began is not None and self._is_passed_over():
            self.search.steps += 1
            self._mark = tuple(a + b for a, b in zip(self._mark, _since(self._start, self._totals()), strict=True))
        elif self._began is not None:
            warms_up = self.search.state == "warm up"
            waited = sum(_since(self._start, self._totals())[1:])
            known = self._compared[0].traffic.on_host  # elsewhere the host waits for other things, too
            if self.search.note(now - self._began, exchange=waited if known else None):
                self._ask([self._said()])
                self._asked = time.perf_counter() - now
            elif warms_up:
                self._mark = self._totals()
        sent, parameters = self._pairs[self.search.spec]
        if self._moves is not None:
            self._moves.take(self._plans[self._role][sent].codec)
        for one in self._steered if self._moves is None else ():
            one.gradients = self._plans[self._role][sent]
            if self._plans["parameters"]:
                one.parameters = self._plans["parameters"][parameters]
        self._noted.clear()
        self._spared, self._start = False, self._totals()
        self._began = time.perf_counter()
        warn_of(self.search.choices[choices:], self._steered[0].rank == 0)  # last: a warning may be an error

    def may_begin(self) -> bool:
        """Whether the coming forward begins a step. A step is delayed while backwards of the last one are outstanding."""
        if self.due and self.outstanding and self._put_off < PATIENCE:
            self._put_off += 1
            return False
        return self.due

    def _is_passed_over(self) -> bool:
        """Whether the step that ends does not count: an evaluation has gathered for it. Of such steps in a row each second one
        counts, or a loop that evaluates before each step would never end its search."""
        self._passed_over = self._spared and not self._passed_over
        return self._passed_over

    def begin_forward(self, trains: bool) -> None:
        """Note that a forward begins, after `begin_step` if it begins a step. What one that trains nothing exchanges, such as
        a validation's, belongs to no step."""
        self._evaluates_from = None if trains else self._totals()[1:]
        if trains and len(self._compared) == 1:  # all ranks gather together; with replicas one may evaluate alone
            self._spared, self._gathered = self._spared or self._gathered, False

    def end_forward(self) -> None:
        """Note that a forward ends."""
        if self._evaluates_from is not None:
            gradients, parameters = _since(self._evaluates_from, self._totals()[1:])
            self._left_out = (self._left_out[0] + gradients, self._left_out[1] + parameters)
            self._evaluates_from = None

    def note(self, role: str, n: int, itemsize: int) -> None:
        """Note an exchange of this step: n values of a gradient before it is reduced, or of a shard that is gathered."""
        if self._evaluates_from is None:
            self._noted[role, n, itemsize] += 1
        else:
            self._gathered = True

    def note_waiting(self, role: str, seconds: float) -> None:
        """Note the seconds that training has waited for an exchange of the framework's own."""
        if role in self._waited:
            self._waited[role] += seconds

    def explain(self) -> str:
        """Return the specs that were tried last, and their steps, as a table."""
        return explained(self.search, self.world_size, self._compared[0].traffic.on_host)

    def break_even(self) -> None:
        """Return None: the model has no link, so it knows no bandwidth above which `none` would be faster."""
        return None

    # the figures that the ranks exchange

    def _ask(self, rows: list[Any]) -> None:
        """Send the figures so far to the next group. After the last group all ranks have the figures of all, in one order."""
        one = self._asks[len(self._questions)]
        told: dict[str, object] = {"rows": rows}
        self._questions.append(one.traffic.send_question(told, "how long the steps took", len(rows) * ROOM))

    def _said(self) -> dict[str, object]:
        said: dict[str, object] = {**self.search.said(), "asked": self._asked}
        if self.search.state == "plain":
            steps, *seconds = _since(self._mark, self._totals())
            waited = (of / max(1, steps) for of in seconds)
            said["roles"] = {
                role: {"waited": seconds, "costs": {spec: self._cost(role, plan) for spec, plan in plans.items()}}
                for (role, plans), seconds in zip(self._plans.items(), waited, strict=True)
            }
        return said

    def _totals(self) -> tuple[float, ...]:
        """Return the steps so far, and the seconds that training has waited for gradients, or moves, and for parameters."""
        own = {self._role: self._compared[-1], "parameters": self._compared[0]}
        gradients, parameters = (one.traffic.spent(role)[0] + self._waited[role] for role, one in own.items())
        return self.search.steps, gradients - self._left_out[0], parameters - self._left_out[1]

    def _cost(self, role: str, plan: Plan) -> tuple[int, float]:
        """Return the bytes that this rank sends by `plan` in a step of the noted exchanges, and the seconds of its codec."""
        if role == "updates":
            return self._cost_of_moves(plan.codec)
        own = self._compared[-1 if role == "gradients" else 0]
        W, native = own.world_size, native_times(own.device)
        speed, sent, coding = self._speeds[str(plan.codec)], 0, 0.0
        for n, itemsize in ((n, size) for of, n, size in self._noted.elements() if of == role):
            if role == "gradients" and len(self._compared) > 1:
                choice = plan.choose(n, itemsize, W)
                messages = transfers(choice, n, itemsize, W)
                sent += sum(message.sent for message in messages)
                if choice.codec.lossy:
                    coding += n * _coded(speed, choice.exchange.payloads(choice.codec, W))
                    coding += (len(messages) > 1) * -(-n // W) * (speed.recode[0] + (W - 1) * speed.recode[1])
                continue
            m = n if role == "parameters" else -(-n // W)
            choice = plan.choose(m, itemsize, W)
            if not choice.codec.lossy:
                sent += (W - 1) * m * itemsize * (native if role == "gradients" else 1)
                continue
            sent += (W - 1) * choice.codec.nbytes(m)
            if role == "gradients":
                coding += n * speed.encode + m * (speed.mean[0] + (W - 1) * speed.mean[1])
            else:
                coding += m * speed.encode + W * m * speed.mean[0]
        return sent, coding

    def _cost_of_moves(self, codec: Codec) -> tuple[int, float]:
        """Return the same of moves, which this rank sends to owners and gets back from them; both ends decode them."""
        assert self._moves is not None
        W, speed = self.world_size, self._speeds[str(codec)]
        n = self._moves.values // W * (W - 1) // W
        if not codec.lossy:
            return 2 * 4 * n, 0.0
        back = self._speeds[self._moves.back]
        coding = sum(one.encode + 2 * one.mean[0] for one in (speed, back))
        return codec.nbytes(n) + parse(self._moves.back).nbytes(n), n * coding

    def _predicted(self, everyone: Sequence[Said], plain: float) -> Mapping[str, float]:
        """Return the predicted seconds of a step by candidate: a plain step, minus the saved waiting, plus the coding."""
        return {
            name: max(LEAST * plain, plain + sum(_gain(everyone, *of) for of in zip(self._plans, pair, strict=True)))
            for name, pair in self._pairs.items()
        }


def begins_steps(auto: ShardedAuto) -> Callable[..., None]:
    """Return a forward pre-hook for a model: it begins a step in the first training forward after one became due."""

    def before(module: Any, arguments: Any) -> None:
        trains = module.training and torch.is_grad_enabled()
        if auto.due and trains and auto.may_begin():
            # must not be compiled; torch.compiler is slow to import, so it is used only if it is there
            (torch.compiler.disable(auto.begin_step) if "torch._dynamo" in sys.modules else auto.begin_step)()
        auto.begin_forward(trains)

    before._torchdynamo_disable = True  # type: ignore[attr-defined]
    return before


def ends_forwards(auto: ShardedAuto) -> Callable[..., None]:
    """Return a forward hook for a model, which `begins_steps` needs."""

    def behind(module: Any, arguments: Any, output: Any) -> None:
        auto.end_forward()

    behind._torchdynamo_disable = True  # type: ignore[attr-defined]
    return behind


def follows_backwards(auto: ShardedAuto, makes_due: Callable[[], bool]) -> Callable[..., None]:
    """Return a forward hook for a model: a forward is outstanding until a backward reaches its output.

    `makes_due` says whether this backward itself makes a step due, as on one rank, where no gradient is exchanged.
    """
    outstanding, told = auto.outstanding, weakref.ref(auto)  # the graph keeps a gradient's hook alive

    def ran(forward: object, gradient: Tensor) -> None:
        outstanding.discard(forward)
        if (auto := told()) is not None and makes_due():
            auto.due = True

    def behind(module: Any, arguments: Any, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        forward = object()
        for one in torch.utils._pytree.tree_leaves(output):
            if isinstance(one, Tensor) and one.requires_grad and not one.is_leaf:  # a leaf would keep the hook for good
                outstanding.add(forward)
                one.register_hook(partial(ran, forward))

    behind._torchdynamo_disable = True  # type: ignore[attr-defined]
    return behind


def _since(before: tuple[float, ...], now: tuple[float, ...]) -> tuple[float, ...]:
    """Return the differences of totals."""
    return tuple(b - a for a, b in zip(before, now, strict=True))


def _named(gradients: str, parameters: str) -> str:
    """The name of a candidate."""
    return gradients if parameters == PLAIN else f"{gradients}, parameters {parameters}"


def _coded(speed: Speed, payloads: int) -> float:
    """Return the seconds a value to encode it and to average `payloads` payloads."""
    return speed.encode + speed.mean[0] + (payloads - 1) * speed.mean[1]


def _gain(everyone: Sequence[Said], role: str, spec: str) -> float:
    """Return the seconds by which a step changes if this role is sent by `spec`, from all ranks' figures; below 0: shorter."""
    if spec == PLAIN:
        return 0.0
    told: list[Any] = [said["roles"][role] for said in everyone]  # type: ignore[index]
    dense, sent = (sum(one["costs"][of][0] for one in told) for of in (PLAIN, spec))
    less = 1 - sent / dense if dense else 0.0
    coding = max(float(one["costs"][spec][1]) for one in told)
    return coding - fmean(one["waited"] for one in told) * less
