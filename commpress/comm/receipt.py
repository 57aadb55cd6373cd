"""The receipt of a session: whether compression has paid in this run, in seconds and bytes, and on which links it would pay."""

from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from commpress.comm.choice import Choice, cause_of
from commpress.comm.codecs import AUTO
from commpress.comm.meter import NOT_SENT, SPEC_IS_NONE, Report, Row, dense_in
from commpress.comm.search import PLAIN

GIVEN = "steps without compression were not measured (attach(model) measures them)"
"""Why no seconds are known of a spec that was given."""


@dataclass
class Receipt:
    """Costs and savings of a session on this rank. Seconds and bytes are of one step; bytes are means over all steps."""

    spec: str
    """The spec of the gradients; while a search tries others it is still the chosen one."""
    steps: int
    sent_bytes: float
    fp32_bytes: float
    """Bytes that a dense exchange in float32 would have sent."""
    bf16_bytes: float
    link_bytes: float | None = None
    """Bytes that this rank's host has sent, all programs together, by the kernel's count; None where it is not known."""
    seconds: float | None = None
    """Seconds of a step by the spec, up to step `step`: when it was chosen, or compared with the next one. None if they were
    not measured."""
    plain_seconds: float | None = None
    """Seconds of a step whose gradients are sent uncompressed, by `none`, measured in the same run, up to step `plain_step`;
    None if they were not."""
    step: int | None = None
    plain_step: int | None = None
    whole: bool = True
    """Whether `auto` decides for all that is compressed. If not, values with a spec of their own are compressed in plain
    steps, too."""
    break_even: float | None = None
    """Bytes a second of a link on which `break_even_spec` is predicted to take as long as `none`; None if not known."""
    break_even_spec: str = ""
    """The chosen spec; if that is `none`, the one that is predicted to pay first where links are slower."""
    uncompressed: dict[str, int] = field(default_factory=dict)
    """Values of a step that were not compressed, by reason."""
    cause: str = ""
    """How specs hurt that `auto` does without; empty if time alone has decided."""
    unmeasured: str = GIVEN
    """Why seconds are not known, if they are not."""

    @property
    def is_off(self) -> bool:
        """Return whether `auto` compresses nothing: it would not pay, or it hurt (`cause`)."""
        return self.spec == PLAIN and self.plain_seconds is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as plain numbers, strings and dicts."""
        return {**asdict(self), "is_off": self.is_off}

    def __str__(self) -> str:
        return "\n".join([*self._time(), *self._left(), self.summary])

    def _repr_html_(self) -> str:
        lines = "<br>\n".join(map(escape, str(self).splitlines()))
        return f"<p>{lines}</p>"

    @property
    def summary(self) -> str:
        """Return one line about bytes and, if measured, speed: the last line of the receipt."""
        if self.is_off:
            speed = self._off
        elif self.seconds is None or self.plain_seconds is None:
            speed = self.unmeasured
        else:
            speed = f"{self.plain_seconds / self.seconds:.2f} times as fast as {self._plain}"
        return f"commpress {self.spec}: {self._bytes()}; {speed}"

    @property
    def _off(self) -> str:
        return f"compression is off: {self.cause}" if self.cause else "compression does not pay here, it is off"

    @property
    def _plain(self) -> str:
        return "without compression" if self.whole else f"with none in the place of {AUTO}"

    def _time(self) -> list[str]:
        if self.is_off:
            told = f"commpress: {self._off}: a step takes {self.plain_seconds:.4f} s{self._when(self.plain_step)}"
            return [told if self.cause else told + self._pays]
        if self.seconds is None or self.plain_seconds is None:
            return []
        times = self.plain_seconds / self.seconds
        return [
            f"commpress {self.spec}: a step takes {self.seconds:.4f} s, {self._plain} {self.plain_seconds:.4f} s "
            f"(both measured in this run{self._when(self.step, self.plain_step)}): {times:.2f} times as fast"
            + self._pays
        ]

    @property
    def _pays(self) -> str:
        """Where it is predicted to pay."""
        if self.break_even is None:
            return ""
        if self.break_even == float("inf"):
            return "; predicted to pay on a link of any speed"
        by = f", by {self.break_even_spec}" if self.is_off else ""
        return f"; predicted to pay on links below {self.break_even * 8 / 1e9:.2g} Gbit/s{by}"

    @staticmethod
    def _when(*steps: int | None) -> str:
        """Return up to which steps seconds were measured, in words; nothing if it is not known."""
        known = dict.fromkeys(str(step) for step in steps if step is not None)
        return f", up to step{'s' * (len(known) > 1)} {' and '.join(known)}" if known else ""

    def _bytes(self) -> str:
        def against(dense: float) -> str:
            return f"{dense / self.sent_bytes:.1f}x" if self.sent_bytes else "-"

        told = (
            f"sent {self.sent_bytes / 1e6:.3f} MB a step, mean of {self.steps} steps: a dense exchange in float32 sends "
            f"{against(self.fp32_bytes)} of that, in bfloat16 {against(self.bf16_bytes)}"
        )
        kernel = "" if self.link_bytes is None else f"; the kernel counted {self.link_bytes / 1e6:.3f} MB for this host"
        return told + kernel

    def _left(self) -> list[str]:
        return [f"not compressed: {values:,} values a step, {why}" for why, values in self.uncompressed.items()]


def _left_exact(row: Row) -> dict[str, int]:
    """Return the values of a row that were sent uncompressed, by reason. Of those whose spec is none, only those that a rule
    leaves exact count, with the rule as the reason: the others are nobody's wish, or on trial by `auto`."""
    if not row.reason or row.exchange == NOT_SENT:
        return {}
    if row.reason != SPEC_IS_NONE:
        return {row.reason: row.values}
    real = sum(row.rules.values())  # complex values are two of them
    return {rule: row.values * n // real for rule, n in row.rules.items() if n and rule.endswith(f": {PLAIN}")}


def receipt(
    report: Report,
    choice: Choice | None,
    spec: str,
    counted: int | None,
    break_even: tuple[str, float] | None,
    whole: bool = True,
    searches: bool = False,
) -> Receipt:
    """Make the receipt from a report; `counted` are the kernel's bytes since the session began, `break_even` is a spec and
    its bytes a second, `whole` as in `Receipt`; `searches` says whether `auto` makes the choice."""
    steps = max(1, report.steps)
    mine, plain = (None if choice is None else choice.trial(spec) for spec in (choice.spec if choice else "", PLAIN))
    uncompressed: dict[str, int] = {}
    for row in report.rows if report.world_size > 1 else ():
        for why, values in _left_exact(row).items():
            uncompressed[why] = uncompressed.get(why, 0) + values * row.steps
    return Receipt(
        spec,
        report.steps,
        report.sent_bytes / steps,
        sum(dense_in(row, 4) for row in report.rows) / steps,
        sum(dense_in(row, 2) for row in report.rows) / steps,
        link_bytes=None if counted is None else counted / steps,
        seconds=None if mine is None else mine.measured,
        plain_seconds=None if plain is None else plain.measured,
        step=None if mine is None else mine.step,
        plain_step=None if plain is None else plain.step,
        whole=whole,
        break_even=None if break_even is None else break_even[1],
        break_even_spec="" if break_even is None else break_even[0],
        uncompressed={why: -(-values // steps) for why, values in uncompressed.items()},
        cause=cause_of(report.choices),
        unmeasured=_unmeasured(report.world_size, searches and choice is None),
    )


def _unmeasured(world_size: int, looks: bool) -> str:
    """Return why no seconds are known: there is one rank, `auto` looks for its first choice, or a spec was given."""
    if world_size == 1:
        return "one rank: nothing to send"
    return f"{AUTO} is still looking" if looks else GIVEN
