"""FSDP2 (`fully_shard`), by its `set_custom_all_gather` and `set_custom_reduce_scatter`.

FSDP calls them for one module at a time, in the caller's thread, in the same order on every rank: it gathers the parameters
before the module's forward, and again before its backward if it reshards; behind that it reduces the gradients that there are.
It divides beforehand and afterwards by itself and asks for SUM, AVG or PREMUL_SUM. What it gathers are copies of its
shards: nothing here reaches those. It waits for a gather where it needs the parameters; on CPU all of ours return at once,
so that what FSDP prefetches travels beside backward. For a reduction it waits there and then.

On a mesh of replicas x shards (HSDP) the gradients are compressed where they are averaged over the replicas, between nodes;
among the shards of a replica, inside a node, they are dense. FSDP has no public way to replace that average: it calls
`all_reduce` of a process group that it keeps, and ours stands in for it (`Replicas`).

From what torch keeps private come that process group, the parameters that travel together, and which module is the root.
`Unit` and `root` know where; `units`, which attach calls first, says so if something is not where torch 2.13 has it.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from commpress.comm.agreement import agree_on_all
from commpress.comm.codecs import Codec
from commpress.comm.collectives import Collectives, GradScaler
from commpress.comm.exchange.reduce_scatter import Op
from commpress.comm.feedback import Segments
from commpress.comm.masks_index import MaskIndex, of_pairs
from commpress.comm.parameters import bare_name, real_numel, unfit_dtype
from commpress.comm.plan import Override, plans, sharded_settings
from commpress.comm.resize import Memories
from commpress.comm.session import Session
from commpress.comm.verify import EVERY, require_interval
from commpress.comm.work import Work
from commpress.hooks.parameters import not_taken
from commpress.optim.advice import advise
from commpress.optim.base import CompressedOptimizer

INSIDE = "among the shards of a replica"
AGAIN = "decoded before, sharded anew after forward"


def attach(
    model: nn.Module,
    gradients: str | Codec,
    *,
    parameters: str | Codec | None = None,
    buffers: str | Codec | None = None,
    optimizer: CompressedOptimizer | None = None,
    exchange: str | None = None,
    error_feedback: bool = True,
    grad_scaler: GradScaler | None = None,
    verify: int = EVERY,
) -> Session:
    """Compress what FSDP sends for `model`, the root of the modules that `fully_shard` took. Collective over its mesh.

    `gradients` is the spec of the reduce-scatter (on a mesh of replicas and shards: of the mean over the replicas),
    `parameters` that of the all-gather (default: not compressed), for which sparse specs are refused. The sharded parameters
    stay in full precision; forward and backward compute with what was decoded, also when the model is evaluated.
    `error_feedback` takes a float32 for every value of the whole model on every rank. `grad_scaler` is the run's
    `torch.amp.GradScaler`, if there is one. Every `verify` steps (0: never) the ranks compare hashes of what they gathered, and
    payloads have checksums.

    Raises on all ranks: ValueError if a spec is unknown, if the ranks differ, or if a trained parameter has a dtype whose
    gradients cannot be exchanged, such as float8; TypeError for an `optimizer` of `commpress.optim`, for `buffers` and
    `exchange`; RuntimeError for a module inside the root, or one that has custom collectives already, ours or others. A model
    that was not run yet does not know its root: then the first forward raises.
    """
    held = units(model)
    device = held[0].group.device
    plan: Any = None
    refusal = not_taken("buffers", buffers, "FSDP sends none")
    refusal = refusal or not_taken("exchange", exchange, "FSDP's are a reduce-scatter and an all-gather")
    refusal = refusal or _refusal(model, held, optimizer)
    if refusal is None:
        try:
            plan = plans(gradients, "none" if parameters is None else parameters, error_feedback)
            require_interval(verify)
        except (ValueError, TypeError) as error:
            refusal = error
    inner = {ranks(group): group for unit in held for group in unit.shard_groups}
    outer = {ranks(group): group for unit in held if (group := unit.replica_group) is not None}
    described = f"{sum(len(unit.names) for unit in held)} with {sum(unit.values for unit in held)} values"
    settings: dict[str, object] = {
        "parameters": f"{described} in {len(held)} modules",
        "scaler": grad_scaler is not None,
        "verify": verify,
    }
    if plan is not None:
        settings |= {"gradients' plan": plan[0].settings(), "parameters' plan": plan[1].settings()}
    agree_on_all(settings, [*inner.values(), *outer.values()], device, refusal)

    make = partial(Collectives, device=device, gradients=plan[0], parameters=plan[1])
    make = partial(make, verify=verify, grad_scaler=grad_scaler)
    shards = {who: make(group) for who, group in inner.items()}
    replicas = {who: make(group) for who, group in outer.items()}
    for unit in held:
        unit.module.set_custom_all_gather(Gather(shards, unit))
        unit.module.set_custom_reduce_scatter(Reduce(shards[ranks(unit.shard_groups[0])], unit))
        unit.follow()
        if unit.replica_group is not None:
            unit.replace_replica_group(Replicas(replicas[ranks(unit.replica_group)], unit))
    first = held[0]

    def mask_index(masks: Mapping[str, Tensor]) -> list[MaskIndex]:
        _require_fit(masks, held)
        return [_of_shards(who, held, masks) for who in shards] + [_of_replicas(who, held, masks) for who in replicas]

    session = Session(
        *shards.values(),
        *replicas.values(),
        spec=f"gradients {plan[0].codec}, parameters {plan[1].codec}",
        settings=sharded_settings(plan[0], plan[1], described),
        rank=first.rank,
        world_size=first.world_size,
        masks=mask_index,
        reshard=partial(_resharded, held) if len(shards) == 1 and not replicas else None,
        values=sum(unit.values for unit in held),
    )
    _watch(model, session)
    advise(plan[0].codec, {p for unit in held for p in unit.trained_parameters()}, session.rank == 0)
    return session


@dataclass
class Unit:
    """What FSDP communicates together: the parameters of one `fully_shard` call. `group` is torch's FSDPParamGroup."""

    index: int
    module: Any
    group: Any
    names: list[str]

    def __post_init__(self) -> None:
        info, later = self.group.mesh_info, self.group.post_forward_mesh_info
        self.shard_groups: list[dist.ProcessGroup] = [i.shard_process_group for i in (info, later) if i is not None]
        """The group that owns the shards, and the one among which FSDP may shard anew after forward."""
        several = getattr(info, "replicate_mesh_size", 1) > 1
        self.replica_group: dist.ProcessGroup | None = info.replicate_process_group if several else None
        self.rank, self.world_size = info.shard_mesh_rank, info.shard_mesh_size
        if self.replica_group is not None:
            self.rank += info.shard_mesh_size * info.replicate_mesh_rank
            self.world_size *= info.replicate_mesh_size
        self.values = sum(p._orig_size.numel() * _reals(p) for p in self.group.fsdp_params)
        self.comms: list[object] = [self.group._all_gather_comm, self.group._reduce_scatter_comm]
        self.parts()
        self._touched: set[str] = set()
        self._layouts: dict[Segments, Segments] = {}

    def trained_parameters(self) -> list[Tensor]:
        """The shards of what wants gradients now."""
        return [p.sharded_param for p in self.group.fsdp_params if p.sharded_param.requires_grad]

    def trained_shards(self) -> dict[str, Tensor]:
        """Return what this rank holds of what wants gradients now, by name."""
        named = zip(self.names, self.group.fsdp_params, strict=True)
        return {name: p.sharded_param.to_local() for name, p in named if p.sharded_param.requires_grad}

    def parts(self) -> Segments:
        """Return what wants gradients now: names, and how many reals of each a rank has, padding included."""
        named = zip(self.names, self.group.fsdp_params, strict=True)
        return tuple((name, _part(p)) for name, p in named if p.sharded_param.requires_grad)

    def gathered(self) -> Segments:
        """The parts of what FSDP gathers, as `full` has them: all parameters, trained or not."""
        named = zip(self.names, self.group.fsdp_params, strict=True)
        parts = tuple((name, _part(p)) for name, p in named)
        return self.full(parts, dist.get_world_size(self.shard_groups[0]))

    def chunks(self, name: str, mask: Tensor) -> list[Tensor]:
        """The mask of each rank's shard of a parameter, by reals: bool [n], padding included."""
        p = self.group.fsdp_params[self.names.index(name)]
        dim, size = p.fsdp_placement.dim, p.padded_sharded_param_size
        parts = mask.split(size[dim], dim)
        chunks = []
        for rank in range(dist.get_world_size(self.shard_groups[0])):
            chunk = torch.zeros(size, dtype=torch.bool, device=mask.device)
            if rank < len(parts):
                chunk.narrow(dim, 0, parts[rank].size(dim)).copy_(parts[rank])
            chunks.append(of_pairs(chunk.flatten()) if p.sharded_param.is_complex() else chunk.flatten())
        return chunks

    def follow(self) -> None:
        """Note which parameters get a gradient: FSDP reduces those alone, and does not say which they are."""

        def noting(name: str) -> Callable[[Tensor], None]:
            touched = self._touched  # not self: a cycle through autograd is never collected
            return lambda parameter: touched.add(name)

        def behind_first_forward(module: nn.Module, arguments: Any, output: Any) -> None:
            for handle in handles:
                handle.remove()
            for name, p in zip(self.names, self.group.fsdp_params, strict=True):
                if p.unsharded_param.requires_grad:
                    p.unsharded_param.register_post_accumulate_grad_hook(noting(name))

        handles = [module.register_forward_hook(behind_first_forward) for module in self.group.modules]

    def reduced(self, n: int, ends: bool) -> tuple[Segments, str]:
        """The parts of a gradient of `n` reals a rank.

        If they cannot be told, all that are trained, and a reason not to compress. `ends`: nobody asks again in this backward.
        """
        trained = self.parts()
        touched = tuple((name, size) for name, size in trained if name in self._touched)
        if ends:
            self._touched.clear()
        for parts in (trained, touched):
            if n == sum(size for _, size in parts):
                return parts, ""
        return trained, f"{n} of {sum(size for _, size in trained)} values, of unknown parameters"

    def full(self, parts: Segments, chunks: int) -> Segments:
        """The parts of a full gradient: first those of rank 0's shard, then of that of rank 1, ..."""
        if parts not in self._layouts:
            self._layouts[parts] = tuple((f"{name}[{r}]", n) for r in range(chunks) for name, n in parts)
        return self._layouts[parts]

    def replace_replica_group(self, group: "Replicas") -> None:
        """From now on FSDP averages over the replicas by this group's all_reduce."""
        self.group.mesh_info = copy.copy(self.group.mesh_info)  # other modules may have the same
        self.group.mesh_info.replicate_process_group = group


def _name(info: Any, prefixes: Mapping[nn.Module, str], order: Mapping[str, int]) -> str:
    """The bare name of a parameter; of a tied one the first that `named_parameters` has."""
    places = zip([info.module, *info.shared_modules], [info.param_name, *info.shared_param_names], strict=True)
    full = [prefixes[module] + name for module, name in places]
    return bare_name(min(full, key=lambda name: order.get(name, len(order))))


def _part(p: Any) -> int:
    """How many reals of a parameter (torch's FSDPParam) a rank has, padding included."""
    return int(p.padded_sharded_param_size.numel()) * _reals(p)


def _reals(p: Any) -> int:
    """How many reals a value of a parameter has."""
    return 2 if p.sharded_param.is_complex() else 1


def ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The global ranks of a group: FSDP makes a group of its own for each module, of the same ranks."""
    return tuple(dist.get_process_group_ranks(group))


def units(model: nn.Module) -> list[Unit]:
    """The modules of a model that FSDP communicates for, in the order of `model.modules()`.

    Raises RuntimeError if this torch keeps them elsewhere, ValueError if the model is not sharded in a way that this knows.
    """
    prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    order = {name: place for place, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    found: dict[int, Unit] = {}
    try:
        root(model)
        for module in model.modules():
            groups = module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else []
            if len(groups) > 1:
                raise ValueError(
                    f"commpress.attach: {prefixes[module]}* has parameters on {len(groups)} meshes, expected 1"
                )
            for group in groups:
                if not hasattr(group.mesh_info, "shard_mesh_size"):
                    raise ValueError(
                        f"commpress.attach: {prefixes[module]}* is replicated, expected it sharded: use DDP"
                    )
                if id(group) not in found:
                    names = [_name(p._module_info, prefixes, order) for p in group.fsdp_params]
                    found[id(group)] = Unit(len(found), module, group, names)
    except AttributeError as missing:
        raise RuntimeError(
            f"commpress.attach: torch {torch.__version__} has no {missing.name} where 2.13 has it; expected torch 2.13"
        ) from missing
    if not found:
        raise ValueError("commpress.attach: fully_shard took no parameter of this model")
    return list(found.values())


def root(model: Any) -> bool | None:
    """Whether FSDP takes a module for the root; None before the first forward."""
    found = model._get_fsdp_state()._is_root
    return None if found is None else bool(found)


def empty(size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for either side of a gather or a reduction."""
    return torch.empty(*size, dtype=dtype, device=device)


class Gather:
    """FSDP's all-gather of one unit."""

    allocate = staticmethod(empty)

    def __init__(self, shards: dict[tuple[int, ...], Collectives], unit: Unit) -> None:
        self._shards, self._unit = shards, unit

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        """Gather `input_tensor` ([m]) into `output_tensor` ([W * m])."""
        who = ranks(group)
        again = "" if who == ranks(self._unit.shard_groups[0]) else AGAIN
        segments = () if again else self._unit.gathered()  # which do not fit what is gathered as bytes, of mixed dtypes
        work = self._shards[who].all_gather(input_tensor, output_tensor, self._unit.index, again, segments)
        if async_op or output_tensor.device.type == "cpu":
            return work
        work.wait()
        return None


class Reduce:
    """FSDP's reduce-scatter of one unit."""

    allocate = staticmethod(empty)

    def __init__(self, shards: Collectives, unit: Unit) -> None:
        self._shards, self._unit = shards, unit

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Op, async_op: bool = False
    ) -> Work | None:
        """Reduce `input_tensor` ([W * m]) to `output_tensor` ([m])."""
        inside = self._unit.replica_group is not None
        parts, reason = self._unit.reduced(real_numel(output_tensor), ends=not inside)
        if inside and self._shards.gradients.codec.lossy:
            reason = INSIDE
        segments = self._unit.full(parts, self._shards.world_size)
        work = self._shards.reduce_scatter(input_tensor, output_tensor, segments, self._unit.index, op, reason)
        if async_op:
            return work
        work.wait()
        return None


class Replicas(dist.ProcessGroup):
    """The replicas of one unit's shard, as FSDP sees them: a process group whose all_reduce is ours."""

    def __init__(self, shards: Collectives, unit: Unit) -> None:
        super().__init__(shards.rank, shards.world_size)  # type: ignore[call-arg]  # torch's stub lacks this form
        self._shards, self._unit = shards, unit

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> Work:
        """Reduce `tensors` (a list of one, a shard's gradient) over the replicas, in place, by `opts.reduceOp`."""
        (x,) = tensors
        parts, reason = self._unit.reduced(real_numel(x), ends=True)
        override = Override(self._shards.gradients.codec, reason) if reason else None
        return self._shards.all_reduce(x, parts, self._unit.index, op=opts.reduceOp, override=override)


def _require_fit(masks: Mapping[str, Tensor], held: list[Unit]) -> None:
    """Raises ValueError for a mask of no parameter, or of another shape."""
    shapes = {name: p._orig_size for unit in held for name, p in zip(unit.names, unit.group.fsdp_params, strict=True)}
    for name, mask in masks.items():
        if (shape := shapes.get(name)) != mask.shape:
            expected = "no such parameter" if shape is None else tuple(shape)
            raise ValueError(f"mask of {name!r}: shape {tuple(mask.shape)}, the model has {expected}")


def _of_shards(who: tuple[int, ...], held: list[Unit], masks: Mapping[str, Tensor]) -> MaskIndex:
    """What masks keep of the traffic among the ranks `who`, which share parameters: a part a rank, all of one length."""
    parts: dict[str, Tensor] = {}
    together = []
    for unit in held:
        for name in unit.names if ranks(unit.shard_groups[0]) == who else ():
            if name in masks:
                own = {f"{name}[{r}]": chunk for r, chunk in enumerate(unit.chunks(name, masks[name]))}
                parts |= own
                together.append(list(own))
    return MaskIndex(parts, together)


def _of_replicas(who: tuple[int, ...], held: list[Unit], masks: Mapping[str, Tensor]) -> MaskIndex:
    """Return what masks keep of the traffic among the ranks `who`, which own the same shard."""
    return MaskIndex(
        {
            name: unit.chunks(name, masks[name])[dist.get_rank(unit.shard_groups[0])]
            for unit in held
            if unit.replica_group is not None and ranks(unit.replica_group) == who
            for name in unit.names
            if name in masks
        }
    )


def _resharded(held: list[Unit], memories: list[Memories], old: int) -> list[Memories]:
    """Return what feedback kept of gradients that were cut for `old` ranks, cut as they are now.

    Raises ValueError where that cannot be told: parameters cut along another dimension than the first, or masked ones.
    """
    parameters = {name: (unit, p) for unit in held for name, p in zip(unit.names, unit.group.fsdp_params, strict=True)}
    (buckets,) = memories
    return [[_recut(bucket, parameters, old) for bucket in buckets]]


def _recut(bucket: dict[str, Any], parameters: dict[str, tuple[Unit, Any]], old: int) -> dict[str, Any]:
    segments = [(str(name), int(n)) for name, n in bucket["segments"]]
    residual, sizes = bucket["residual"], [n for _, n in segments]
    names = [name.removesuffix("[0]") for name, _ in segments[: len(segments) // old]]
    if residual is not None and residual.numel() != sum(sizes):
        raise ValueError(
            f"cannot restore: feedback of {names[0]!r} and others was saved under masks by {old} ranks; expected as many now"
        )
    parts = None if residual is None else dict(zip((name for name, _ in segments), residual.split(sizes), strict=True))
    chunks: dict[str, list[Tensor]] = {}
    lengths: dict[str, int] = {}
    W = 0
    for name in names:
        unit, p = parameters[bare_name(name)]
        W = dist.get_world_size(unit.shard_groups[0])
        if p.fsdp_placement.dim != 0:
            raise ValueError(
                f"cannot restore: {name!r} is cut along dimension {p.fsdp_placement.dim}, which was saved by {old} ranks; "
                "expected as many now"
            )
        values, lengths[name] = p._orig_size.numel() * _reals(p), p.padded_sharded_param_size.numel() * _reals(p)
        if parts is not None:
            whole = torch.cat([parts[f"{name}[{r}]"] for r in range(old)])[:values]  # the rest is padding
            chunks[name] = list(torch.nn.functional.pad(whole, (0, W * lengths[name] - values)).split(lengths[name]))
    return {
        "segments": [[f"{name}[{r}]", lengths[name]] for r in range(W) for name in names],
        "owner_start": 0,
        "owner_residual": None,
        "momentum": None,
        "residual": None if parts is None else torch.cat([chunks[name][r] for r in range(W) for name in names]),
    }


def _refusal(model: nn.Module, held: list[Unit], optimizer: CompressedOptimizer | None) -> Exception | None:
    """Why this rank cannot attach, if it cannot."""
    if optimizer is not None:
        return TypeError(
            f"optimizer: {type(optimizer).__name__} does not work on sharded parameters; expected DistributedDataParallel for "
            "it, or a torch optimizer here, which needs no optimizer="
        )
    if root(model) is False:
        return RuntimeError("commpress.attach: this module is inside another that fully_shard took; expected the root")
    for unit in held:
        if unfit := unfit_dtype(unit.trained_shards()):
            return ValueError(unfit)
        for comm in unit.comms:
            if isinstance(comm, Gather | Reduce):
                return RuntimeError("commpress.attach: attached already; expected a model without a session")
            if not type(comm).__name__.startswith("Default"):
                return RuntimeError(
                    f"commpress.attach: {unit.names[0]} and others travel by {type(comm).__name__}; expected FSDP's default"
                )
    return None


def _watch(model: nn.Module, session: Session) -> None:
    """Have the session follow the loss scale from forward to forward."""

    state: Any = cast(
        Any, model
    )._get_fsdp_state()  # looked up once: torch.compile cannot trace a dict of weak references

    def before(module: nn.Module, arguments: Any) -> None:
        if state._is_root is False:  # FSDP's own hook, before this one, found out
            raise RuntimeError(
                "commpress.attach was given a module inside another that fully_shard took; expected the root"
            )
        session.follow_scale()

    model.register_forward_pre_hook(before)
