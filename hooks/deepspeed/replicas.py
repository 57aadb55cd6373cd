"""ZeRO 0, where every rank holds the whole model; also ZeRO 1 and 2 with a compressed optimizer, which then work the same."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from commpress.comm.exchange.wire import ring_bytes
from commpress.comm.meter import SPEC_IS_NONE, dtype_name
from commpress.comm.parameters import dense
from commpress.comm.plan import Plan
from commpress.comm.replicas import replicas_session
from commpress.comm.rules import Spec
from commpress.comm.segments import Segment, Segments, sizes
from commpress.comm.session import Session
from commpress.comm.step_buffer import StepBuffer
from commpress.hooks.parameters import bare_parameters
from commpress.optim.base import CompressedOptimizer

BUCKET = 4 << 20
"""Values of a bucket. DeepSpeed would send all of them as one; here the next is encoded while one is on the wire."""


def attach_replicas(
    engine: Any,
    plan: Plan,
    found: Spec | None,
    names: dict[Tensor, str],
    optimizer: CompressedOptimizer | None,
    verify: int,
) -> Session:
    """Replace an engine's mean of all gradients; at ZeRO 1 and 2 also the methods that shard them.

    `found` is `auto` or a dict of specs by patterns of names, which then decide instead of the plan's codec; else None.
    """
    if optimizer is not None:
        if engine.zero_optimization():
            _hand_back(engine.optimizer)
        optimizer.bind({name: p for p, name in names.items()}, engine.seq_dp_world_size, may_be_unused=False)
        engine.clip_fp32_gradients = partial(_clip_means, engine.clip_fp32_gradients, optimizer)
    session = replicas_session(
        plan.codec if found is None else found,
        engine.seq_data_parallel_group,
        torch.device(engine.device),
        exchange=None if plan.exchange is None else str(plan.exchange),
        error_feedback=plan.error_feedback,
        parameters=tuple(Segment.whole(name, p) for p, name in names.items()),
        optimizer=optimizer,
        verify=verify,
        dtypes={p.dtype for p in names},
    )
    assert session.step_buffer is not None
    if optimizer is not None:
        optimizer.hand_over(session.step_buffer)
    session.step_buffer.replicas = lambda: [
        (name, p if optimizer is None else optimizer.replica(p)) for p, name in names.items()
    ]
    dense = optimizer is None and found is None and not plan.codec.lossy
    replicas = Replicas(engine.module, session.step_buffer)
    if engine.zero_optimization():
        _step_all(engine, replicas)
        return session
    original = engine.buffered_allreduce_fallback
    engine.buffered_allreduce_fallback = partial(replicas.count, original) if dense else replicas.average
    return session


def _clip_means(original: Callable[[], None], optimizer: CompressedOptimizer) -> None:
    """Apply `gradient_clipping` to mean gradients only: after its warm-up a compressed optimizer's `grad` is an update."""
    if optimizer.takes_means:
        original()


def _hand_back(zero: Any) -> None:
    """Give the optimizer whole parameters again. Under ZeRO 1 and 2 it holds this rank's partition instead."""
    for group, parameters in zip(zero.optimizer.param_groups, zero.bit16_groups, strict=True):
        group["params"] = list(parameters)


def _step_all(engine: Any, replicas: "Replicas") -> None:
    """Have every rank of a ZeRO 1 or 2 engine keep its gradients, and step all parameters.

    `single_partition_of_fp32_groups` stays partitioned: checkpoints hold it, and training does not read it.
    """
    zero = engine.optimizer

    def keep(*_: Any) -> None:
        """Leave a gradient that has come where it is."""

    def exchange() -> None:
        if zero.is_gradient_accumulation_boundary():
            replicas.average()

    def step(closure: Any = None) -> None:
        if engine.gradient_clipping() > 0:
            engine.clip_fp32_gradients()
        zero.optimizer.step()

    def state_dict(original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        parts = (parts[replicas.step_buffer.collectives.rank] for parts in zero.parallel_partitioned_bit16_groups)
        for part, master in zip(parts, zero.single_partition_of_fp32_groups, strict=True):
            master.data.copy_(part)
        return original()

    zero.process_gradients = zero.reduce_ready_partitions_and_remove_grads = keep
    zero.overlapping_partition_gradients_reduce_epilogue = exchange
    zero.finalize_gradient_accumulation_boundary = replicas.average
    zero.step = step
    zero.state_dict = partial(state_dict, zero.state_dict)


@dataclass
class Bucket:
    """Parameters of one dtype whose gradients are sent together in `flat` ([n]), each in the memory order of its parameter."""

    parameters: list[Any]
    segments: Segments
    flat: Tensor

    def parts(self) -> list[Tensor]:
        """Return each parameter's gradient, a view of `flat`."""
        flat = self.flat.split(sizes(self.segments))
        return [
            part.as_strided(p.shape, p.stride(), part.storage_offset()) if dense(p) else part.view(p.shape)
            for p, part in zip(self.parameters, flat, strict=True)
        ]


@dataclass
class Replicas:
    """A model that every rank holds whole, and the traffic of its gradients."""

    module: nn.Module
    step_buffer: StepBuffer
    _buckets: dict[tuple[int, ...], list[Bucket]] = field(default_factory=dict)

    def average(self, grads: Any = None, elements_per_buffer: int = BUCKET) -> None:
        """Replace all gradients by their mean. A missing gradient counts as 0, as under DeepSpeed."""
        trained = self._trained()
        key = tuple(id(p) for p in trained.values())
        if key not in self._buckets:
            self._buckets[key] = list(_filled(trained))
        buckets, futures = self._buckets[key], []
        for index, bucket in enumerate(buckets):
            for p, part in zip(bucket.parameters, bucket.parts(), strict=True):
                if p.grad is None:
                    part.zero_()
                elif p.grad.data_ptr() != part.data_ptr():
                    part.copy_(p.grad)
                p.grad = part
            futures.append(self.step_buffer.submit(bucket.flat, bucket.segments, index, bucket is buckets[-1]))
        for future in futures:
            future.wait()

    def count(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Call DeepSpeed's own mean, and count its bytes."""
        original(*args, **kwargs)
        meter, trained = self.step_buffer.collectives.meter, self._trained().values()
        for index, dtype in enumerate(dict.fromkeys(p.dtype for p in trained)):
            n = sum(p.numel() for p in trained if p.dtype == dtype)
            sent = ring_bytes(n * dtype.itemsize, self.step_buffer.collectives.world_size)
            meter.record_uncompressed(index, n, dtype_name(dtype), "all_reduce", SPEC_IS_NONE, "gradients", sent)
        meter.steps += 1

    def _trained(self) -> dict[str, Any]:
        return {name: p for name, p in bare_parameters(self.module).items() if p.requires_grad and p.numel()}


def _filled(trained: dict[str, Any]) -> Iterator[Bucket]:
    """Yield buckets in the order of the parameters; a bucket ends with the parameter that fills it."""
    for dtype in dict.fromkeys(p.dtype for p in trained.values()):
        waiting: dict[str, Any] = {}
        alike = [(name, p) for name, p in trained.items() if p.dtype == dtype]
        for name, p in alike:
            waiting[name] = p
            n = sum(q.numel() for q in waiting.values())
            if n >= BUCKET or p is alike[-1][1]:
                segments = tuple(Segment.whole(name, q) for name, q in waiting.items())
                yield Bucket(list(waiting.values()), segments, torch.empty(n, dtype=dtype, device=p.device))
                waiting = {}
