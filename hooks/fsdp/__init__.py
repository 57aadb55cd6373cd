"""FSDP2 (`fully_shard`), by its `set_custom_all_gather` and `set_custom_reduce_scatter`.

FSDP calls them for one module at a time, in the caller's thread, in the same order on every rank. It gathers the parameters
before the module's forward, and again before its backward if it reshards; after the backward it reduces the gradients. FSDP
divides the gradients itself, before and after, and asks for SUM, AVG or PREMUL_SUM. It gathers copies of its shards, so the
shards themselves are never changed here. It waits for a gather where it needs the parameters. On CPU our gathers return at
once, so that a prefetched gather runs beside backward. FSDP waits for a reduction as soon as it has started it.

On a mesh of replicas x shards (HSDP) the gradients are compressed where they are averaged over the replicas, between nodes.
Among the shards of a replica, inside a node, they are dense. FSDP has no public way to replace the average over the replicas:
it calls `all_reduce` of a process group that it keeps, and `Replicas` takes the place of that group.

With EF21Muon the gradients are reduced by its `others_spec`. At each step the momentum of a matrix's rows is sent, by the spec,
to the one rank that owns the matrix, and the update is sent back.

`units.py` reads everything that torch keeps private: the process group of the replicas, the parameters that are sent together,
and which module is the root. `comms.py` has the collectives that FSDP calls. `masks.py`, `reshard.py` and `muon.py` adapt
masks, saved states and EF21Muon to FSDP's shards.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from commpress.comm.agreement import agree_on_all
from commpress.comm.codecs import AUTO, Codec
from commpress.comm.collectives import Collectives, GradScaler
from commpress.comm.masks_index import MaskIndex, require_shapes
from commpress.comm.parameters import unfit_dtype
from commpress.comm.plan import plans, sharded_settings, sharded_spec
from commpress.comm.search import PLAIN
from commpress.comm.session import Session
from commpress.comm.sharded_auto import ShardedAuto, begins_steps, decides, ends_forwards, follows_backwards
from commpress.comm.verify import EVERY, require_interval
from commpress.hooks.fsdp import muon
from commpress.hooks.fsdp.comms import Gather, Reduce, Replicas
from commpress.hooks.fsdp.masks import of_replicas, of_shards
from commpress.hooks.fsdp.reshard import resharded
from commpress.hooks.fsdp.units import Unit, ranks, root, units
from commpress.hooks.parameters import not_taken
from commpress.optim.advice import advise
from commpress.optim.muon import EF21Muon
from commpress.optim.sharded_muon import Momentum, momentum_of


def attach(
    model: nn.Module,
    gradients: str | Codec = AUTO,
    *,
    parameters: str | Codec | None = None,
    buffers: str | Codec | None = None,
    optimizer: EF21Muon | None = None,
    exchange: str | None = None,
    error_feedback: bool = True,
    grad_scaler: GradScaler | None = None,
    verify: int = EVERY,
) -> Session:
    """Compress what FSDP2 sends for `model`, the root module that `fully_shard` was applied to. Collective over its mesh.

    `gradients` is the spec of the reduce-scatter (on a mesh of replicas and shards: of the mean over the replicas). Without it
    a spec is found during training, as under DDP, but the error of the means is not measured. `parameters` is the spec of the
    all-gather (default: not compressed; sparse specs are refused); `auto` finds it in the same search, among `none`, `bf16`
    and `int8`. The sharded parameters stay in full precision; forward and backward compute with the decoded values, also in
    evaluation. `delta|int4` sends the change since the last gather, and adds what the codec left out to the next change; every
    rank then keeps two bytes for each value of the whole model.

    `error_feedback` takes a float32 for every value of the whole model on every rank. `grad_scaler` is the run's, if it has
    one. Every `verify` steps (0: never) the ranks compare hashes of the gathered values, and payloads have checksums.

    `optimizer` is an EF21Muon of the shards. Then `gradients` is the spec of its momentum (default: `auto`), gradients go by
    its `others_spec`, and memory grows only by shards and by the matrices that a rank owns (`commpress.optim.sharded_muon`).

    Raises on all ranks: ValueError if a spec is unknown, if the ranks differ, or if a trained parameter has a dtype whose
    gradients cannot be exchanged, such as float8; ValueError for an EF21Muon on more than one dimension of a mesh, with
    offloaded parameters, or without a trained parameter; TypeError for another `optimizer` of `commpress.optim`, for `buffers`
    and for `exchange`; RuntimeError for a module that is not the root, and for one that already has custom collectives. FSDP
    finds the root in the first forward: if the model has not run yet, that forward raises.
    """
    plan: Any = None
    momentum: Momentum | None = None
    by_auto, held = (False, False), units(model)
    device = held[0].device
    refusal = not_taken("buffers", buffers, "FSDP sends none")
    refusal = refusal or not_taken("exchange", exchange, "FSDP's are a reduce-scatter and an all-gather")
    refusal = refusal or _refusal(model, held, optimizer)
    if refusal is None:
        try:
            if optimizer is not None:
                momentum = momentum_of(gradients, optimizer, error_feedback, parameters)
                gradients, error_feedback = optimizer.param_groups[0]["others_spec"], False
            by_auto = decides(gradients, parameters)
            if by_auto[0]:
                _require_one_mesh(held)
            specs = (PLAIN if by_auto[0] else gradients, PLAIN if by_auto[1] or parameters is None else parameters)
            plan = plans(*specs, error_feedback)
            require_interval(verify)
        except (ValueError, TypeError) as error:
            refusal = error
    inner = {ranks(group): group for unit in held for group in unit.shard_groups}
    outer = {ranks(group): group for unit in held if (group := unit.replica_group) is not None}
    described = f"{sum(len(unit.names) for unit in held)} with {sum(unit.values for unit in held)} values"
    settings: dict[str, object] = {"parameters": f"{described} in {len(held)} modules"}
    sent, by = None if momentum is None else momentum.spec, None if optimizer is None else type(optimizer).__name__
    settings |= {"scaler": grad_scaler is not None, "verify": verify, "optimizer": by, "momentum": sent}
    settings |= _planned(plan, by_auto)
    agree_on_all(settings, [*inner.values(), *outer.values()], device, refusal)

    make = partial(
        Collectives, device=device, gradients=plan[0], parameters=plan[1], verify=verify, grad_scaler=grad_scaler
    )
    shards = {who: make(group) for who, group in inner.items()}
    replicas = {who: make(group) for who, group in outer.items()}
    first, dtypes = shards[ranks(held[0].shard_groups[0])], {dtype for unit in held for dtype in unit.dtypes}
    own, of_all = [first, *replicas.values()], [*shards.values(), *replicas.values()]
    auto = ShardedAuto(of_all, own, error_feedback, by_auto[1], dtypes) if by_auto[0] else None
    if optimizer is not None and momentum is not None:
        sharded = muon.shard(optimizer, first, held, momentum.codec)
        auto = ShardedAuto([first], [first], True, moves=sharded) if sent == AUTO else None
    _stand_in(held, shards, replicas, auto)
    saved = sharded_settings(plan[0], plan[1], described, by_auto, sent)
    spec = sharded_spec(plan[0], plan[1], by_auto, sent)
    session = _session(held, shards, replicas, spec, saved, auto, optimizer)
    _watch(model, held, session, auto)
    advise(plan[0].codec, {p for unit in held for p in unit.trained_parameters()}, session.rank == 0)
    return session


def _planned(plan: Any, by_auto: tuple[bool, bool]) -> dict[str, object]:
    """Return the settings of both plans, which must be equal on all ranks; an empty dict if this rank has no plan."""
    if plan is None:
        return {}
    chosen = [role for role, auto in zip(("gradients", "parameters"), by_auto, strict=True) if auto]
    return {"gradients' plan": plan[0].settings(), "parameters' plan": plan[1].settings(), "by auto": chosen}


def _stand_in(
    held: list[Unit],
    shards: dict[tuple[int, ...], Collectives],
    replicas: dict[tuple[int, ...], Collectives],
    auto: ShardedAuto | None,
) -> None:
    """Have FSDP call these collectives in place of its own."""
    for unit in held:
        unit.module.set_custom_all_gather(Gather(shards, unit, auto))
        unit.module.set_custom_reduce_scatter(Reduce(shards[ranks(unit.shard_groups[0])], unit, auto))
        unit.follow()
        if unit.replica_group is not None:
            unit.replace_replica_group(Replicas(replicas[ranks(unit.replica_group)], unit, auto))


def _session(
    held: list[Unit],
    shards: dict[tuple[int, ...], Collectives],
    replicas: dict[tuple[int, ...], Collectives],
    spec: str,
    settings: dict[str, object],
    auto: ShardedAuto | None,
    optimizer: EF21Muon | None,
) -> Session:
    """Return the session of these units. `shards` and `replicas` map the ranks of a group to its collectives."""

    def mask_index(masks: Mapping[str, Tensor]) -> list[MaskIndex]:
        require_shapes(masks, {name: shape for unit in held for name, shape in unit.shapes().items()})
        if optimizer is not None and masks:
            raise ValueError(
                "masks: EF21Muon mixes the values of a matrix, and where it is sharded nothing sets pruned ones back to 0; "
                "expected DistributedDataParallel, or a torch optimizer"
            )
        return [of_shards(who, held, masks) for who in shards] + [of_replicas(who, held, masks) for who in replicas]

    return Session(
        *shards.values(),
        *replicas.values(),
        spec=spec,
        settings=settings,
        auto=auto,
        rank=held[0].rank,
        world_size=held[0].world_size,
        masks=mask_index,
        reshard=partial(resharded, held) if len(shards) == 1 and not replicas else None,
        values=sum(unit.values for unit in held),
    )


def _refusal(model: nn.Module, held: list[Unit], optimizer: object) -> Exception | None:
    """Return the error if this rank cannot attach, else None. Binds an EF21Muon to the shards."""
    if optimizer is not None and not isinstance(optimizer, EF21Muon):
        return TypeError(
            f"optimizer: {type(optimizer).__name__} does not work on sharded parameters; expected DistributedDataParallel for "
            "it, or here EF21Muon, or a torch optimizer, which needs no optimizer="
        )
    if root(model)() is False:
        return RuntimeError("commpress.attach: this module is inside another that fully_shard took; expected the root")
    for unit in held:
        if unfit := unfit_dtype(unit.trained_shards()):
            return ValueError(unfit)
        for comm in unit.comms:
            if isinstance(comm, Gather | Reduce):
                return RuntimeError("commpress.attach: attached already; expected a model without a session")
            if not type(comm).__name__.startswith("Default"):
                return RuntimeError(
                    f"commpress.attach: {unit.names[0]} and others are sent by {type(comm).__name__}, expected FSDP's default"
                )
    return None if optimizer is None else muon.refusal(held, optimizer)


def _require_one_mesh(held: list[Unit]) -> None:
    """Raise ValueError for units on several meshes: no single group of ranks can compare all of them."""
    meshes = {(ranks(u.shard_groups[0]), None if u.replica_group is None else ranks(u.replica_group)) for u in held}
    if len(meshes) > 1:
        raise ValueError(
            f"gradients: auto for modules on {len(meshes)} meshes: no group of ranks can compare all of them; expected one "
            "mesh, or a spec, such as 'int4'"
        )


def _watch(model: nn.Module, held: list[Unit], session: Session, auto: ShardedAuto | None) -> None:
    """Have the session follow the loss scale at every forward, and `auto` begin its steps there."""
    is_root = root(model)

    def before(module: nn.Module, arguments: Any) -> None:
        if is_root() is False:  # FSDP's own hook has run before this one, and has found the root
            raise RuntimeError(
                "commpress.attach was given a module inside another that fully_shard took; expected the root"
            )
        session.follow_scale()

    model.register_forward_pre_hook(before)
    if auto is not None:
        model.register_forward_pre_hook(begins_steps(auto), prepend=True)  # before FSDP's own hook, which gathers
        model.register_forward_hook(ends_forwards(auto))
        # one rank copies, and exchanges nothing that would make a step due
        groups = [unit.group for unit in held] if session.world_size == 1 else []
        model.register_forward_hook(follows_backwards(auto, lambda: any(group.reduce_grads for group in groups)))
