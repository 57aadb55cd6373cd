"""Distillation (Hinton et al., arXiv:1503.02531): a student that trains learns from a teacher that stays as it is.

L = (1 - weight) * task + weight * T^2 * KL(softmax(y_t / T) || softmax(y_s / T)) + hidden states + attention probabilities

Hidden states are matched as DistilBERT does (cosine; Sanh et al., arXiv:1910.01108) or TinyBERT (mean squares, through a
learned projection where widths differ; Jiao et al., arXiv:1909.10351); attention probabilities by mean squares or KL.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, softmax

from commpress.model.captures import Captures, modules_of
from commpress.model.held import whole

PROJECTIONS = "distillation_projections"
"""The student's child that `add_projections` makes. `del student.distillation_projections` before the student leaves."""


@dataclass(frozen=True)
class Distillation:
    """How a teacher teaches. Raises ValueError if a setting is out of its range."""

    temperature: float = 2.0
    """Softens both distributions; 1 leaves them as they are."""
    weight: float = 0.5
    """The soft labels' share in [0, 1]; the task's own loss has the rest. At 0 they are not computed."""
    soft: str = "kl"
    """`kl`, or `cross_entropy`, which is larger by the teacher's entropy and has the same gradients."""
    hidden: Mapping[str, str] = field(default_factory=dict)
    """Student's module -> teacher's module, by the names in `named_modules()`, whose outputs are to be alike."""
    hidden_loss: str = "mse"
    """`mse` or `cosine`, the mean over positions and pairs."""
    hidden_weight: float = 1.0
    """At 0 nothing is captured."""
    attention: Mapping[str, str] = field(default_factory=dict)
    """The same for modules that return `(output, probabilities)`, as Transformers' do under `attn_implementation="eager"`."""
    attention_loss: str = "mse"
    """`mse` or `kl`. What a student's attention dropout zeroes costs much under `kl`: set it to 0 there."""
    attention_weight: float = 1.0
    """At 0 nothing is captured."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"Distillation(temperature={self.temperature}): expected a number above 0, got {self.temperature}"
            )
        if not 0 <= self.weight <= 1:
            raise ValueError(f"Distillation(weight={self.weight}): expected a share in [0, 1], got {self.weight}")
        for name in ("hidden_weight", "attention_weight"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"Distillation({name}={value}): expected 0 or a number above it, got {value}")
        for name, known in (
            ("soft", ("kl", "cross_entropy")),
            ("hidden_loss", ("mse", "cosine")),
            ("attention_loss", ("mse", "kl")),
        ):
            if (form := getattr(self, name)) not in known:
                raise ValueError(f"Distillation({name}={form!r}): expected {' or '.join(known)}, got {form!r}")


def soft_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, form: str = "kl", positions: Tensor | None = None
) -> Tensor:
    """T^2 * KL(softmax(y_t / T) || softmax(y_s / T)), the mean over positions, float32, or float64 of float64 logits.

    As `cross_entropy`: - T^2 * sum_i y_t,i log y_s,i of the softened probabilities. Logits are [..., classes]; where
    `positions`, bool [...], is False they are not looked at. Values and gradients are those of `torch.nn.functional`'s
    `kl_div` and `cross_entropy` with probabilities; a class that both exclude by -inf, where those give NaN, adds 0.
    Raises ValueError if shapes do not fit.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"soft labels: the student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: "
            "expected equal shapes (one vocabulary, one padding)"
        )
    if positions is not None:
        if positions.dtype != torch.bool or positions.shape != student.shape[:-1]:
            raise ValueError(
                f"soft labels: expected positions bool {tuple(student.shape[:-1])}, got "
                f"{str(positions.dtype).removeprefix('torch.')} {tuple(positions.shape)}"
            )
        student, teacher = student[positions], teacher[positions]
    log_s = log_softmax(_wide(student) / temperature, dim=-1)
    p_t = softmax(_wide(teacher) / temperature, dim=-1)
    # from probabilities, as 0 log 0 is 0; the logarithm of the teacher's would make it 0 * -inf
    each = kl_div(log_s, p_t, reduction="none") if form == "kl" else -log_s * p_t
    each = each.masked_fill_(p_t == 0, 0)  # where the student's logit is -inf, too
    return temperature**2 * _mean(each.sum(dim=-1))


def hidden_loss(student: Tensor, teacher: Tensor, form: str = "mse", positions: Tensor | None = None) -> Tensor:
    """Mean of (h_s - h_t)^2, or of 1 - cos(h_s, h_t), over positions, float32 (or float64). They are [..., width]."""
    if positions is not None:
        student, teacher = student[positions], teacher[positions]
    if form == "cosine":
        return _mean(1 - cosine_similarity(_wide(student), _wide(teacher), dim=-1))
    return _mean((_wide(student) - _wide(teacher)).square())


def attention_loss(student: Tensor, teacher: Tensor, form: str = "mse", positions: Tensor | None = None) -> Tensor:
    """Mean of (a_s - a_t)^2, or of sum_j a_t,j log(a_t,j / a_s,j) over heads and queries, float32 (or float64).

    Where a student's probability is 0 and the teacher's is not, its logarithm is taken as that of the least normal number.
    Probabilities are [batch, heads, queries, keys] or [batch, queries, keys], `positions` bool [batch, queries].
    """
    if positions is not None:
        student, teacher = student.movedim(-2, 1)[positions], teacher.movedim(-2, 1)[positions]
    student, teacher = _wide(student), _wide(teacher)
    if form == "kl":
        # a masked key has probability 0 in both: 0, not 0 * -inf
        log_s = student.masked_fill(student == 0, torch.finfo(student.dtype).tiny).log()
        return _mean(kl_div(log_s, teacher, reduction="none").sum(dim=-1))
    return _mean((student - teacher).square())


class Distiller:
    """A teacher beside a student that trains.

        distiller = Distiller(student, teacher, Distillation(temperature=2.0, weight=0.5))
        output = ddp_student(x)
        distiller.loss(task_loss, output, x).backward()

    The student is the bare module, the one inside DDP, or what `fully_shard` took in place. The teacher is whole on each
    rank and never part of the student: it is frozen and in eval mode from here on, its weights equal on all ranks (load
    it from one file, or compare `fingerprint`). Layers are captured by forward hooks: if one is called several times in a
    forward the last call counts. Hooks inside an activation checkpoint work if it is not reentrant; outside, on the
    checkpointed module itself, they always do. A deepcopy of the student is not watched. What replaces a captured
    module (quantisation, pruning) takes its hook along: make a new Distiller then.

    Raises ValueError for a module name that is unknown and for a teacher that shares parameters with the student.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: Distillation | None = None) -> None:
        self.teacher = teacher
        self.settings = s = settings or Distillation()
        own = {id(p) for p in student.parameters()}
        if shared := next((name for name, p in teacher.named_parameters() if id(p) in own), None):
            raise ValueError(f"the teacher's {shared!r} is the student's as well: give it a copy, copy.deepcopy(model)")
        hidden = s.hidden if s.hidden_weight else {}
        attention = s.attention if s.attention_weight else {}
        self._pairs = [("hidden", *pair) for pair in hidden.items()]
        self._pairs += [("attention", *pair) for pair in attention.items()]
        at_student = modules_of(student, "student", [name for _, name, _ in self._pairs])
        at_teacher = modules_of(teacher, "teacher", [name for _, _, name in self._pairs])
        projections = getattr(student, PROJECTIONS, {})
        self._projected = {name: projections[_key(name)] for name in hidden if _key(name) in projections}
        self._student = Captures(student, "student", at_student, [pair[:2] for pair in self._pairs], self._projected)
        self._teacher = Captures(teacher, "teacher", at_teacher, [pair[::2] for pair in self._pairs], {})
        self._parts: dict[str, Tensor] = {}
        teacher.requires_grad_(False)
        teacher.eval()

    def loss(
        self, task_loss: Tensor, student_output: Any, *inputs: Any, positions: Tensor | None = None, **named: Any
    ) -> Tensor:
        """The whole loss of the student's last forward, a scalar; the teacher runs on `inputs` and `named`.

        `student_output` is its logits [..., classes] or has them as `.logits`. `labels` are not given to the teacher. Soft
        labels count where `positions`, bool [...], is True, for instance `positions=labels != -100`; without it, and for
        layers always, where a `named["attention_mask"]` [batch, time] of the same size is not 0. Means are over this
        rank's positions, as DDP has it. One loss for each forward.

        Raises ValueError if shapes do not fit, and if a layer has no output or none that leads to the student's parameters;
        TypeError if an output has no logits.
        """
        s = self.settings
        captured = self._student.take()
        self._parts = {"task": task_loss.detach()}
        total = (1 - s.weight) * task_loss
        if not s.weight and not self._pairs:
            return total
        logits = _logits(student_output, "student")
        self.teacher.eval()  # whoever called train() on it
        with torch.no_grad():
            teacher_output = self.teacher(*inputs, **{name: value for name, value in named.items() if name != "labels"})
        taught = self._teacher.take()
        mask = named.get("attention_mask")
        if s.weight:
            where = _mask_for(mask, logits.shape[:-1]) if positions is None else positions
            soft = soft_loss(logits, _logits(teacher_output, "teacher"), s.temperature, s.soft, where)
            total = total + s.weight * self._noted("soft", soft)
        values: dict[str, list[Tensor]] = {}
        for kind, mine, theirs in self._pairs:
            h, target = captured[kind, mine], taught[kind, theirs]
            self._check(kind, mine, theirs, h, target, logits)
            if kind == "hidden":
                value = hidden_loss(h, target, s.hidden_loss, _mask_for(mask, h.shape[:-1]))
            else:
                value = attention_loss(h, target, s.attention_loss, _mask_for(mask, h.shape[:1] + h.shape[-2:-1]))
            values.setdefault(kind, []).append(value)
        for kind, each in values.items():
            weight = s.hidden_weight if kind == "hidden" else s.attention_weight
            total = total + weight * self._noted(kind, torch.stack(each).mean())
        return total

    def watch(self, on: bool) -> None:
        """Whether the next forwards are captured. Off, the hooks stay: what torch.compile compiles meanwhile has them."""
        self._student.watch(on)
        self._teacher.watch(on)

    @property
    def not_called(self) -> list[tuple[str, str]]:
        """The student's modules, as ("hidden" or "attention", name), that no forward has called so far, watched or not."""
        return self._student.not_called

    @property
    def parts(self) -> dict[str, float]:
        """The last loss in its parts, without their weights: task, soft, hidden, attention. Waits for the device."""
        return {name: float(value) for name, value in self._parts.items()}

    def close(self) -> None:
        """Take the hooks off both models. `loss` is not to be called afterwards."""
        self._student.close()
        self._teacher.close()

    def _noted(self, part: str, value: Tensor) -> Tensor:
        self._parts[part] = value.detach()
        return value

    def _check(self, kind: str, mine: str, theirs: str, h: Tensor, target: Tensor, logits: Tensor) -> None:
        if h.shape != target.shape:
            advice = ""
            if kind == "hidden" and h.shape[:-1] == target.shape[:-1] and mine not in self._projected:
                widths = (h.shape[-1], target.shape[-1])
                advice = f"; add_projections(student, {{{mine!r}: {widths}}}), before it is wrapped, learns the way"
            raise ValueError(
                f"{kind} of {mine!r}: the student's is {tuple(h.shape)}, the teacher's ({theirs!r}) "
                f"{tuple(target.shape)}: expected equal shapes{advice}"
            )
        if logits.requires_grad and not h.requires_grad:
            raise ValueError(
                f"{kind} of {mine!r}: no trained parameter leads to it: either everything before it is frozen, or it is inside "
                "a reentrant activation checkpoint; checkpoint with use_reentrant=False"
            )


def add_projections(student: nn.Module, widths: Mapping[str, tuple[int, int]]) -> None:
    """Give the student a learned linear map for each of these modules, from its width to the teacher's, before hidden states
    are compared: `add_projections(student, {"blocks.0": (64, 128)})`.

    They are the student's parameters, so call this before the student is wrapped and its optimizer is made: then gradients
    are exchanged as all others. They are used in the loss alone. So under DDP, which waits for the gradients of all its
    parameters, each step must have that loss, and `find_unused_parameters` cannot be on.
    Raises ValueError for an unknown name, and for an `nn.Sequential`.
    """
    if isinstance(student, nn.Sequential):
        raise ValueError(
            "add_projections: a Sequential calls all its children, expected a module with a forward of its own"
        )
    modules_of(student, "student", list(widths))
    projections = {_key(name): nn.Linear(inner, outer, bias=False) for name, (inner, outer) in widths.items()}
    like = next(student.parameters())
    setattr(student, PROJECTIONS, nn.ModuleDict(projections).to(like.device, like.dtype))


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers with their names, for a checkpoint to know its teacher by."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        x = whole(x).cpu().contiguous()
        hashed.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        hashed.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _logits(output: Any, who: str) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(f"the {who}'s output: expected logits, or an output that has them, got {type(output).__name__}")


def _mask_for(mask: Any, shape: Sequence[int]) -> Tensor | None:
    return mask != 0 if isinstance(mask, Tensor) and mask.shape == torch.Size(shape) else None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)  # no positions: 0, still with a graph


def _key(name: str) -> str:
    return name.replace(".", "/")  # a ModuleDict's keys have no dots
