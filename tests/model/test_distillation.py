"""Distillation against its definitions, on models of our own and Transformers', alone and on ranks."""

import argparse
import copy
import gc
import math
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from tiers import slow
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from training import same

import commpress
from commpress.launch.model import GPT, Shape
from commpress.model.distilbert import distilbert_from
from commpress.model.distillation import (
    Distillation,
    Distiller,
    add_projections,
    attention_loss,
    fingerprint,
    hidden_loss,
    soft_loss,
)

LIBRARIES = ("transformers",)
pytestmark = pytest.mark.usefixtures("ranks_of_our_own")  # Transformers stays in them
TIME, CLASSES = 6, 5


class Layer(nn.Module):
    """One attention layer that returns (output, probabilities), as Transformers' do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, probabilities = self.mix(x, x, x, average_attn_weights=False)
        return self.norm(x + self.up(y).tanh()), probabilities


class Net(nn.Module):
    """Tokens [batch, time] -> logits [batch, time, classes]; with a dropout by which train mode is seen."""

    def __init__(self, layers: int, width: int = 8, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, CLASSES)
        self.reentrant = reentrant

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x, _ = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        logits: Tensor = self.head(self.dropout(x))
        return logits


EVERYTHING = Distillation(
    temperature=3.0,
    weight=0.25,
    hidden={"layers.0.norm": "layers.1.norm", "embedding": "embedding"},
    hidden_weight=0.7,
    attention={"layers.0": "layers.0"},
    attention_weight=1.5,
)


def net(layers: int, seed: int, **more: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Net(layers, **more)
    made.dropout.p = 0.0
    return made


def narrow_student(projected: str = "layers.0", **more: Any) -> Net:
    """Half the teacher's width."""
    student = net(1, 0, width=4, **more)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        add_projections(student, {projected: (4, 8)})
    return student


def tokens(seed: int, batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(CLASSES, (batch, TIME), generator=generator)
    return x, (x + 1) % CLASSES


def loss_of(student: nn.Module, distiller: Distiller, x: Tensor, y: Tensor, **named: Any) -> Tensor:
    logits = student(x)
    return distiller.loss(cross_entropy(logits.flatten(0, 1), y.flatten()), logits, x, **named)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


# the losses


def logits_of_two(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        (2 * torch.randn(3, 4, CLASSES, generator=generator)).requires_grad_(),
        3 * torch.randn(3, 4, CLASSES, generator=generator),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_labels_are_the_papers_formula(temperature: float) -> None:
    s, t = logits_of_two()
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (t, s))
    kl = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(soft_loss(s, t, temperature).double(), kl, rtol=1e-5, atol=0)


def torchs_soft_loss(s: Tensor, t: Tensor, temperature: float, form: str) -> Tensor:
    s, p = s.float().flatten(0, 1) / temperature, softmax(t.float().flatten(0, 1) / temperature, -1)
    if form == "kl":
        return temperature**2 * kl_div(log_softmax(s, -1), p, reduction="batchmean")
    return temperature**2 * cross_entropy(s, p)


LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [(0, -math.inf), (-1e4, -math.inf), (0, -1e4), (-1e4, 1e4), (LEAST, LEAST), (0, LEAST), (1e4, 0), (-math.inf, 0)],
)
def test_soft_labels_are_torchs_where_logits_are_extreme(
    student: float, teacher: float, dtype: torch.dtype, form: str
) -> None:
    results = []
    for loss in (soft_loss, torchs_soft_loss):
        s, t = (x.detach().clone() for x in logits_of_two())
        s[..., 2] += student
        t[..., 2] += teacher
        t[1, 1, 3] = teacher
        s = s.to(dtype).requires_grad_()
        value = loss(s, t.to(dtype), 2.0, form)
        value.backward()
        results.append((value.detach(), s.grad))
    (value, gradient), (torchs, torchs_gradient) = results
    torch.testing.assert_close(gradient, torchs_gradient)
    if not torchs.isnan():  # both have the class excluded, in 16 bits
        torch.testing.assert_close(value, torchs)
    assert value.isfinite() or student == -math.inf


@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
def test_a_class_that_both_exclude_adds_nothing(form: str) -> None:
    s, t = logits_of_two()
    without = soft_loss(s[..., :-1], t[..., :-1], 2.0, form)
    (expected,) = torch.autograd.grad(without, s)
    out = torch.zeros(CLASSES)
    out[-1] = -math.inf
    value = soft_loss(s + out, t + out, 2.0, form)
    torch.testing.assert_close(value, without)
    torch.testing.assert_close(torch.autograd.grad(value, s)[0], expected)


def test_nan_where_nobody_looks_changes_nothing() -> None:
    where = torch.ones(3, 4, dtype=torch.bool)
    where[1:, 2:] = False
    for form in ("kl", "cross_entropy"):
        (s, t), (clean_s, clean_t) = logits_of_two(), logits_of_two()
        with torch.no_grad():
            s[~where], t[~where] = math.nan, math.inf
        loss, clean = (soft_loss(*both, 2.0, form, where) for both in ((s, t), (clean_s, clean_t)))
        loss.backward()
        clean.backward()
        assert torch.equal(loss, clean)
        assert torch.equal(s.grad, clean_s.grad)  # type: ignore[arg-type]
        for nothing in (hidden_loss, soft_loss):
            empty = nothing(s, t, positions=torch.zeros_like(where))
            assert not empty.any()
            assert not torch.autograd.grad(empty, s)[0].any()


def test_losses_of_float64_are_float64() -> None:
    s, t = (x.double() for x in logits_of_two())
    a, b = softmax(s, -1), softmax(t, -1)
    p = softmax(t / 2, -1)
    for loss, expected in (
        (
            soft_loss(s, t, 2.0),
            4 * kl_div(log_softmax(s / 2, -1).flatten(0, 1), p.flatten(0, 1), reduction="batchmean"),
        ),
        (hidden_loss(s, t), (s - t).square().mean()),
        (attention_loss(a, b, "kl"), kl_div(a.log().flatten(0, 1), b.flatten(0, 1), reduction="batchmean")),
    ):
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_attentions_kl_is_torchs_where_that_is_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2, 3, 5, 7, generator=generator)
    a[..., 1] = 1e-41  # not a normal number
    b[..., 2] = 0
    ours, theirs = a.clone().requires_grad_(), a.clone().requires_grad_()
    loss = attention_loss(ours, b, "kl")
    expected = kl_div(theirs.log(), b, reduction="none").sum(-1).mean()
    torch.testing.assert_close(
        (loss, *torch.autograd.grad(loss, ours)), (expected, *torch.autograd.grad(expected, theirs))
    )
    masked = a.clone()
    masked[..., 2] = 0
    masked.requires_grad_()
    loss = attention_loss(masked, b, "kl")
    loss.backward()
    assert loss.isfinite()
    assert masked.grad is not None
    assert masked.grad[..., 3:].isfinite().all()


def test_cross_entropy_is_the_customers_formula_and_has_the_gradients_of_kl() -> None:
    s, t = logits_of_two()
    ours = soft_loss(s, t, form="cross_entropy")
    p, q = torch.softmax(t, -1), torch.softmax(s, -1)
    torch.testing.assert_close(ours, -(p * q.log()).sum(-1).mean())
    (one,) = torch.autograd.grad(ours, s)
    (other,) = torch.autograd.grad(soft_loss(s, t), s)
    torch.testing.assert_close(one, other)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(ours - soft_loss(s, t), entropy)


def test_positions_that_do_not_count_are_not_looked_at() -> None:
    s, t = logits_of_two()
    positions = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = soft_loss(s[positions], t[positions], 2.0)
    spoilt = s.detach().masked_fill(~positions[..., None], math.nan).requires_grad_()
    value = soft_loss(spoilt, t.masked_fill(~positions[..., None], math.inf), 2.0, positions=positions)
    assert torch.equal(value, expected)
    value.backward()
    assert spoilt.grad is not None
    assert torch.equal(spoilt.grad.ne(0).any(-1), positions)
    none = soft_loss(s, t, positions=torch.zeros(3, 4, dtype=torch.bool))
    none.backward()
    assert none == 0
    assert s.grad is not None
    assert not s.grad.any()


def test_layers_are_compared_by_their_definitions() -> None:
    s, t = logits_of_two()
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]) == 1
    rows = [(s[i, j], t[i, j]) for i in range(3) for j in range(4) if mask[i, j]]
    mse = sum((a - b).square().mean() for a, b in rows) / len(rows)
    cosine = sum(1 - (a @ b) / (a.norm() * b.norm()) for a, b in rows) / len(rows)
    torch.testing.assert_close(hidden_loss(s, t, "mse", mask), mse)
    torch.testing.assert_close(hidden_loss(s, t, "cosine", mask), cosine)
    torch.testing.assert_close(hidden_loss(s, t), (s - t).square().mean())

    scores = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    a, b = scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1)  # [batch, heads, queries, keys]
    each = [(a[i, h, j], b[i, h, j]) for i in range(3) for j in range(4) if mask[i, j] for h in range(2)]
    mse = sum((p - q).square().mean() for p, q in each) / len(each)
    kl = sum((q[q > 0] * (q[q > 0] / p[q > 0]).log()).sum() for p, q in each) / len(each)
    torch.testing.assert_close(attention_loss(a, b, "mse", mask), mse)
    torch.testing.assert_close(attention_loss(a, b, "kl", mask), kl)
    torch.testing.assert_close(attention_loss(a[:, 0], b[:, 0], "kl"), attention_loss(a[:, :1], b[:, :1], "kl"))


# the distiller


def outputs_of(model: Net, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    embedded = model.embedding(x)
    hidden, attention = [], []
    h = embedded
    for layer in model.layers:
        h, probabilities = layer(h)
        hidden.append(h)
        attention.append(probabilities)
    return embedded, hidden, attention, model.head(h)


def test_the_loss_is_the_sum_of_its_parts() -> None:
    student, teacher = net(1, 0), net(2, 1)
    x, y = tokens(0)
    mask = torch.ones_like(x)
    mask[0, 3:] = 0
    distiller = Distiller(student, teacher, EVERYTHING)
    loss = loss_of(student, distiller, x, y, attention_mask=mask)
    e_s, h_s, a_s, l_s = outputs_of(student, x)
    e_t, h_t, a_t, l_t = outputs_of(teacher, x)
    on = mask == 1
    parts = {
        "task": cross_entropy(l_s.flatten(0, 1), y.flatten()),
        "soft": soft_loss(l_s, l_t, 3.0, positions=on),
        "hidden": (hidden_loss(h_s[0], h_t[1], positions=on) + hidden_loss(e_s, e_t, positions=on)) / 2,
        "attention": attention_loss(a_s[0], a_t[0], positions=on),
    }
    torch.testing.assert_close(
        loss, 0.75 * parts["task"] + 0.25 * parts["soft"] + 0.7 * parts["hidden"] + 1.5 * parts["attention"]
    )
    assert distiller.parts == pytest.approx({name: value.item() for name, value in parts.items()}, rel=1e-4)
    labels = y.masked_fill(x == 0, -100)
    loss_of(student, distiller, x, y, positions=labels != -100, labels=labels)  # the teacher takes no labels
    assert distiller.parts["soft"] == pytest.approx(soft_loss(l_s, l_t, 3.0, positions=x != 0).item(), rel=1e-4)


def test_only_the_student_learns_and_the_teacher_is_not_in_it() -> None:
    student, teacher = net(1, 0), net(2, 1)
    names = list(student.state_dict())
    distiller = Distiller(student, teacher, EVERYTHING)
    before = fingerprint(teacher)
    student.train()
    teacher.train()
    teacher.dropout.p = 0.9
    x, y = tokens(0)
    loss = loss_of(student, distiller, x, y)
    assert student.training
    assert not any(m.training for m in teacher.modules())
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in student.named_parameters() if "in_proj_b" not in name)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert list(student.state_dict()) == names
    assert not {id(m) for m in student.modules()} & {id(m) for m in teacher.modules()}
    torch.optim.SGD(student.parameters(), lr=1.0).step()
    assert fingerprint(teacher) == before


def hooks_in(*models: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


def test_hooks_are_there_only_for_what_is_used_and_until_close() -> None:
    student, teacher = net(1, 0), net(2, 1)
    off = Distillation(hidden={"embedding": "embedding"}, hidden_weight=0.0)
    distiller = Distiller(student, teacher, off)
    assert hooks_in(student, teacher) == 0
    loss_of(student, distiller, *tokens(0))
    assert set(distiller.parts) == {"task", "soft"}
    distiller = Distiller(student, teacher, EVERYTHING)
    assert hooks_in(student, teacher) == 2 * (3 + 2)
    distiller.close()
    assert hooks_in(student, teacher) == 0
    never = Distiller(student, nn.Module(), Distillation(weight=0.0))  # it has no forward: it is not run
    x, y = tokens(0)
    assert loss_of(student, never, x, y) == cross_entropy(student(x).flatten(0, 1), y.flatten())


def test_nothing_captured_outlives_the_step() -> None:
    student, teacher = net(1, 0, reentrant=False), net(2, 1)
    distiller = Distiller(student, teacher, Distillation(hidden={"layers.0.up": "layers.1.norm"}))
    kept: list[weakref.ref[Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(weakref.ref(output))

    for module in (student.layers[0].up, teacher.layers[1].norm):  # type: ignore[union-attr]
        module.register_forward_hook(keep)
    loss_of(student, distiller, *tokens(0)).backward()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3  # the student's twice: the checkpoint computes it again in backward


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    student, teacher = net(1, 0), net(2, 1)
    distiller = Distiller(student, teacher, EVERYTHING)
    x, y = tokens(0, batch=8)
    loss_of(student, distiller, x, y).backward()
    whole = [None if g is None else g.clone() for g in gradients(student)]
    student.zero_grad()
    for part in range(4):
        (loss_of(student, distiller, x[2 * part :][:2], y[2 * part :][:2]) / 4).backward()
    torch.testing.assert_close(gradients(student), whole)


def test_layers_inside_a_checkpoint_teach_unless_it_is_reentrant() -> None:
    x, y = tokens(0)
    settings = Distillation(hidden={"layers.0.up": "layers.1.norm"}, attention={"layers.0.mix": "layers.0.mix"})
    plain, checkpointed = (narrow_student("layers.0.up", reentrant=reentrant) for reentrant in (None, False))
    for student in (plain, checkpointed):
        loss_of(student, Distiller(student, net(2, 1), settings), x, y).backward()
    assert plain.distillation_projections["layers/0/up"].weight.grad.any()
    assert same(gradients(plain), gradients(checkpointed))
    student = net(1, 0, reentrant=True)
    distiller = Distiller(student, net(2, 1), Distillation(hidden={"layers.0.up": "layers.1.norm"}))
    with pytest.raises(ValueError, match=r"hidden of 'layers\.0\.up'.* use_reentrant=False"):
        loss_of(student, distiller, x, y)


def test_a_copy_of_the_student_is_not_watched() -> None:
    student, teacher = net(1, 0), net(2, 1)
    distiller = Distiller(student, teacher, EVERYTHING)
    average = copy.deepcopy(student)
    x, y = tokens(0)
    expected = loss_of(student, distiller, x, y)
    logits = student(x)
    average(tokens(1, batch=1)[0])
    task = cross_entropy(logits.flatten(0, 1), y.flatten())
    assert torch.equal(distiller.loss(task, logits, x), expected)
    loss_of(average, Distiller(average, teacher, EVERYTHING), x, y)
    deeper = net(1, 0)
    distiller = Distiller(deeper, teacher, EVERYTHING)
    loss_of(deeper, distiller, x, y)
    first = distiller.parts["attention"]
    deeper.layers.append(copy.deepcopy(deeper.layers[0]))
    loss_of(deeper, distiller, x, y)
    assert distiller.parts["attention"] == first


def test_a_fingerprint_is_of_every_value_and_name() -> None:
    teacher = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).bfloat16()
    first = fingerprint(teacher)
    assert fingerprint(copy.deepcopy(teacher)) == first
    running = copy.deepcopy(teacher)
    running[1].running_mean[1] += 0.5  # type: ignore[index, operator]
    weight = copy.deepcopy(teacher)
    with torch.no_grad():
        weight[0].weight[2, 2] += 0.5
    other = nn.ModuleDict({"a": teacher[0], "b": teacher[1]})
    assert len({first, *map(fingerprint, (running, weight, other, copy.deepcopy(teacher).float()))}) == 5


# what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"Distillation\(temperature=0.0\): expected a number above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"weight": 1.5}, r"expected a share in \[0, 1\], got 1.5"),
        ({"hidden_weight": -1.0}, r"hidden_weight=-1.0\): expected 0 or a number above it"),
        ({"attention_weight": math.inf}, "attention_weight=inf"),
        ({"soft": "mse"}, r"soft='mse'\): expected kl or cross_entropy, got 'mse'"),
        ({"hidden_loss": "kl"}, "expected mse or cosine, got 'kl'"),
        ({"attention_loss": "cosine"}, "expected mse or kl, got 'cosine'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)


def test_models_that_do_not_fit_are_refused() -> None:
    x, y = tokens(0)
    with pytest.raises(ValueError, match=r"the student has no module 'layer\.0'; close to it: 'layers\.0'"):
        Distiller(net(1, 0), net(2, 1), Distillation(hidden={"layer.0": "layers.0"}))
    with pytest.raises(ValueError, match=r"the teacher has no module 'layers\.7'; close to it: .*'layers\.1'"):
        Distiller(net(1, 0), net(2, 1), Distillation(attention={"layers.0": "layers.7"}))
    student = net(1, 0)
    with pytest.raises(ValueError, match=r"'embedding\.weight' is the student's as well: give it a copy"):
        Distiller(student, student)
    assert all(p.requires_grad for p in student.parameters())

    teacher = net(2, 1)
    teacher.head = nn.Linear(8, CLASSES + 1)
    with pytest.raises(ValueError, match=r"logits are \(4, 6, 5\), the teacher's \(4, 6, 6\)"):
        loss_of(student, Distiller(student, teacher), x, y)
    with pytest.raises(ValueError, match=r"expected positions bool \(4, 6\), got int64 \(4, 6\)"):
        loss_of(student, Distiller(student, net(2, 1)), x, y, positions=y)
    with pytest.raises(TypeError, match="the student's output: expected logits, or an output that has them, got dict"):
        Distiller(student, net(2, 1)).loss(torch.zeros(()), {}, x)
    attention = Distiller(student, net(2, 1), Distillation(attention={"embedding": "embedding"}))
    with pytest.raises(TypeError, match=r"attention of 'embedding': expected \(output, probabilities\).* \(4, 6, 8\)"):
        loss_of(student, attention, x, y)


def test_a_layer_without_output_is_named() -> None:
    student = net(1, 0)
    x, y = tokens(0)
    distiller = Distiller(student, net(2, 1), EVERYTHING)
    loss_of(student, distiller, x, y)
    logits = student(x)
    distiller.loss(torch.zeros(()), logits, x)
    with pytest.raises(ValueError, match=r"hidden of the student's 'layers\.0\.norm': no output since the last loss"):
        distiller.loss(torch.zeros(()), logits, x)
    student.embedding = nn.Embedding(CLASSES, 8)
    with pytest.raises(ValueError, match=r"hidden of the student's 'embedding': .* not replaced since"):
        loss_of(student, distiller, x, y)


def test_other_widths_need_a_projection_and_learn_it() -> None:
    student, teacher = net(1, 0, width=4), net(2, 1, width=8)
    x, y = tokens(0)
    settings = Distillation(hidden={"layers.0": "layers.1"}, weight=0.0, hidden_weight=10.0)
    distiller = Distiller(student, teacher, settings)
    with pytest.raises(
        ValueError, match=r"\(4, 6, 4\).*\(4, 6, 8\).*add_projections\(student, {'layers.0': \(4, 8\)}\)"
    ):
        loss_of(student, distiller, x, y)
    distiller.close()
    with pytest.raises(ValueError, match="the student has no module 'layer'; close to it: 'layers'"):
        add_projections(student, {"layer": (4, 8)})
    add_projections(student, {"layers.0": (4, 8)})
    distiller = Distiller(student, teacher, settings)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    seen = []
    for step in range(60):
        optimizer.zero_grad()
        loss_of(student, distiller, *tokens(step)).backward()
        optimizer.step()
        seen.append(distiller.parts["hidden"])
    assert seen[-1] < 0.3 * seen[0]
    h = outputs_of(student, x)[1][0] @ student.distillation_projections["layers/0"].weight.T
    loss_of(student, distiller, x, y)
    assert distiller.parts["hidden"] == pytest.approx(hidden_loss(h, outputs_of(teacher, x)[1][1]).item(), rel=1e-4)


# on ranks

NARROW = Distillation(
    weight=0.5,
    hidden={"layers.0": "layers.1"},
    hidden_loss="cosine",
    attention={"layers.0.mix": "layers.0.mix"},
    attention_loss="kl",
)


def compressed_steps(rank: int) -> tuple[list[Tensor | None], str]:
    student, teacher = narrow_student(), net(2, 1)
    ddp = DistributedDataParallel(student)
    session = commpress.attach(ddp, "int4")
    distiller = Distiller(student, teacher, NARROW)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            x, y = tokens(100 * step + 10 * part + rank)
            if part == 0:
                with ddp.no_sync():
                    loss_of(ddp, distiller, x, y).backward()
            else:
                loss_of(ddp, distiller, x, y).backward()
        optimizer.step()
    assert session.report().steps == 3
    return gradients(student), fingerprint(student)


def on_ddp() -> tuple[list[Tensor | None], str]:
    return compressed_steps(torch.distributed.get_rank())


@pytest.mark.slow
def test_two_ranks_hold_the_same_gradients_under_int4() -> None:
    one, other = run(2, on_ddp)
    assert all(
        g is not None and g.any() for g, (name, _) in zip(one[0], narrow_student().named_parameters(), strict=True)
    )
    assert same(one[0], other[0])
    assert one[1] == other[1]


def on_fsdp() -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    student, teacher = narrow_student(), net(2, 1)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in student.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    distiller = Distiller(student, teacher, NARROW)
    for _ in range(2):
        student.zero_grad()
        loss_of(student, distiller, *tokens(torch.distributed.get_rank())).backward()
    return [p.grad.full_tensor() for p in student.parameters() if p.grad is not None]


@pytest.mark.slow
def test_sharded_students_learn_the_same() -> None:
    student = narrow_student()
    distiller = Distiller(student, net(2, 1), NARROW)
    for rank in range(2):
        (loss_of(student, distiller, *tokens(rank)) / 2).backward()
    for sharded in run(2, on_fsdp):
        torch.testing.assert_close(sharded, gradients(student))


# byte GPTs

BOOK = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
CONTEXT = 32


def text(seed: int, batch: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
    middle = len(BOOK) * 9 // 10
    low, high = (middle, len(BOOK)) if held_out else (0, middle)
    starts = torch.randint(low, high - CONTEXT - 1, (batch,), generator=torch.Generator().manual_seed(seed))
    windows = BOOK[starts[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def train_gpt(model: GPT, steps: int, distiller: Distiller | None = None) -> GPT:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        x, y = text(step, 16)
        logits = model(x)
        loss = cross_entropy(logits.flatten(0, 1), y.flatten())
        if distiller is not None:
            loss = distiller.loss(loss, logits, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def apart(student: nn.Module, teacher: nn.Module, x: Tensor, **more: Any) -> float:
    one, other = student(x), teacher(x)
    if not isinstance(one, Tensor):
        one, other = one.logits, other.logits
    return float(soft_loss(one, other, **more))


def gpt(layers: int, width: int) -> GPT:
    torch.manual_seed(layers)
    return GPT(Shape(layers=layers, width=width, heads=2, context=CONTEXT))


def taught_and_alone(steps: int, teacher_steps: int, settings: Distillation) -> tuple[float, float]:
    teacher = train_gpt(gpt(2, 64), teacher_steps)
    alone = train_gpt(gpt(1, 32), steps)
    student = gpt(1, 32)
    taught = train_gpt(student, steps, Distiller(student, teacher, settings))
    x, _ = text(10_000, 64, held_out=True)
    return apart(taught, teacher, x), apart(alone, teacher, x)


@pytest.mark.slow
def test_a_smaller_gpt_comes_nearer_to_its_teacher() -> None:
    taught, alone = taught_and_alone(80, 60, Distillation(temperature=1.0, weight=0.9))
    assert taught < 0.5 * alone


@pytest.mark.slow
def test_a_smaller_gpt_stays_nearer_to_its_teacher() -> None:
    taught, alone = taught_and_alone(2000, 2000, Distillation(temperature=2.0, weight=0.8))
    assert taught < 0.8 * alone


# Transformers

VOCABULARY, HIDDEN_TOKEN, SYMBOLS, LENGTH = 16, 15, 14, 12
BERT_STEPS = 25


def sequences(seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """Counting up modulo 14, 15 % noise, a quarter masked; labels are -100 where nothing is."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randint(SYMBOLS, (batch, 1), generator=generator) + torch.arange(LENGTH)) % SYMBOLS
    noise = torch.rand(x.shape, generator=generator) < 0.15
    x = torch.where(noise, torch.randint(SYMBOLS, x.shape, generator=generator), x)
    masked = torch.rand(x.shape, generator=generator) < 0.25
    return x.masked_fill(masked, HIDDEN_TOKEN), x.masked_fill(~masked, -100)


def bert(layers: int = 4, attention: str = "eager") -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        attn_implementation=attention,
    )
    return BertForMaskedLM(config)


def train_masked(model: Any, steps: int, distiller: Distiller | None = None) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        x, labels = sequences(step, 32)
        output = model(input_ids=x, labels=labels)
        loss = output.loss
        if distiller is not None:
            loss = distiller.loss(loss, output, input_ids=x, attention_mask=torch.ones_like(x), labels=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT checkpoint as its users have it."""
    folder = tmp_path_factory.mktemp("bert")
    train_masked(bert(), 80).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    from transformers import BertForMaskedLM

    return BertForMaskedLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.slow
def test_a_distilbert_of_all_layers_gives_the_teachers_logits(bert_folder: Path, tmp_path: Path) -> None:
    from transformers import DistilBertForMaskedLM

    teacher = loaded(bert_folder)
    x, _ = sequences(0, 8)
    mask = torch.ones_like(x)
    mask[:4, 9:] = 0
    student = distilbert_from(teacher, [0, 1, 2, 3]).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(x, attention_mask=mask).logits, teacher(x, attention_mask=mask).logits)
    half = distilbert_from(teacher, [0, 2])
    half.save_pretrained(tmp_path)
    again = DistilBertForMaskedLM.from_pretrained(tmp_path)
    assert fingerprint(again) == fingerprint(half)
    query = half.distilbert.transformer.layer[1].attention.q_lin.weight
    assert torch.equal(query, teacher.bert.encoder.layer[2].attention.self.query.weight)
    assert query.data_ptr() != teacher.bert.encoder.layer[2].attention.self.query.weight.data_ptr()


BERT_TO_DISTILBERT = Distillation(
    temperature=2.0,
    weight=0.8,
    hidden={f"distilbert.transformer.layer.{i}": f"bert.encoder.layer.{2 * i + 1}" for i in range(2)},
    hidden_loss="cosine",
    attention={
        f"distilbert.transformer.layer.{i}.attention": f"bert.encoder.layer.{2 * i + 1}.attention.self"
        for i in range(2)
    },
)


@pytest.mark.parametrize(
    "settings", [slow(Distillation(temperature=2.0, weight=0.8)), BERT_TO_DISTILBERT], ids=["soft", "all"]
)
def test_a_distilbert_comes_nearer_to_its_bert(bert_folder: Path, settings: Distillation) -> None:
    teacher = loaded(bert_folder)
    student = distilbert_from(teacher, [0, 2])
    taught = train_masked(student, BERT_STEPS, Distiller(student, teacher, settings))
    x, labels = sequences(10_000, 256)
    where = {"positions": labels != -100}
    assert apart(taught, teacher, x, **where) < 0.7 * apart(untaught(bert_folder), teacher, x, **where)


@cache
def untaught(folder: Path) -> Any:
    """The same student, trained alone."""
    return train_masked(distilbert_from(loaded(folder), [0, 2]), BERT_STEPS)


def test_transformers_attention_other_than_eager_is_named() -> None:
    teacher = bert(2, attention="sdpa")
    student = distilbert_from(teacher, [1])
    settings = Distillation(
        attention={"distilbert.transformer.layer.0.attention": "bert.encoder.layer.1.attention.self"}
    )
    distiller = Distiller(student, teacher, settings)
    x, labels = sequences(0, 2)
    with pytest.raises(TypeError, match=r'layer\.0\.attention.*\(Tensor, NoneType\).*attn_implementation="eager"'):
        train_one(student, distiller, x, labels)


def train_one(student: Any, distiller: Distiller, x: Tensor, labels: Tensor) -> None:
    output = student(input_ids=x, labels=labels)
    distiller.loss(output.loss, output, input_ids=x, labels=labels)


@pytest.mark.parametrize(
    ("teacher", "layers", "error", "message"),
    [
        (lambda: net(1, 0), [0], TypeError, "expected a transformers.BertForMaskedLM, got Net"),
        (bert, [0, 4], ValueError, r"layers=\[0, 4\]\): expected some of the teacher's layers 0 to 3, got \[4\]"),
        (bert, [], ValueError, "got none"),
    ],
)
def test_distilbert_from_refuses(
    teacher: Callable[[], Any], layers: list[int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        distilbert_from(teacher(), layers)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_those_of_its_values_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    """Values that half precision holds, as large as they get, with excluded classes; under autocast as without."""
    draw = torch.Generator().manual_seed(0)
    most = 6e4 if dtype == torch.float16 else 1e30
    student, teacher = (torch.randn(7, 33, generator=draw).mul(5).to(dtype) for _ in range(2))
    student[:, 3] = teacher[:, 3] = -math.inf
    student[0, 5], teacher[0, 6] = most, most
    wide_student, wide_teacher = student.float(), teacher.float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        soft = soft_loss(student, teacher, 2.0)
        cosine = hidden_loss(student[:, 8:], teacher[:, 8:], "cosine")
        mse = hidden_loss(student[:, 8:], teacher[:, 8:])
        rows = [softmax(x[:, 8:].float(), -1).to(dtype)[None] for x in (student, teacher)]
        attention = attention_loss(*rows, "kl")
    log_s, p_t = log_softmax(wide_student / 2, -1), softmax(wide_teacher / 2, -1)
    each = kl_div(log_s, p_t, reduction="none")
    each[:, 3] = 0
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft, 4 * each.sum(-1).mean())
    torch.testing.assert_close(
        cosine, (1 - torch.cosine_similarity(wide_student[:, 8:], wide_teacher[:, 8:], dim=-1)).mean()
    )
    torch.testing.assert_close(mse, (wide_student[:, 8:] - wide_teacher[:, 8:]).square().mean())
    expected = kl_div(rows[0].float().log(), rows[1].float(), reduction="none")[rows[0] > 0].sum() / 7
    assert torch.isfinite(attention)
    if bool((rows[0] > 0).all()):
        torch.testing.assert_close(attention, expected)
