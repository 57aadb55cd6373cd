"""EF21Muon under FSDP2: its matrices as FSDP cuts them, and the models that it refuses."""

from torch import Tensor
from torch.distributed.tensor import DTensor

from commpress.comm.codecs import Codec
from commpress.comm.collectives import Collectives
from commpress.comm.meter import dtype_name
from commpress.hooks.fsdp.units import Unit, ranks
from commpress.optim.muon import EF21Muon
from commpress.optim.sharded_muon import Matrix, ShardedMuon


def refusal(held: list[Unit], optimizer: EF21Muon) -> Exception | None:
    """Return the error if an EF21Muon cannot step these shards; else bind it to them and return None."""
    groups = {ranks(unit.shard_groups[0]) for unit in held}
    if len(groups) > 1 or any(unit.replica_group is not None for unit in held):
        return ValueError(
            "EF21Muon on a mesh of replicas and shards, or on several meshes: expected one mesh of one dimension for all "
            "modules, as fully_shard(module) has it without mesh="
        )
    for unit in held:
        if unit.offloads:
            return ValueError(
                "EF21Muon with CPUOffloadPolicy: each matrix must stay on the device that steps it; leave offload_policy out"
            )
        for name, p in unit.parameters().items():
            if isinstance(p, DTensor) and p.device_mesh.ndim > 1:
                return ValueError(
                    f"EF21Muon: {name!r} is sharded along {p.device_mesh.ndim} dimensions of a mesh, as by tensor parallelism; "
                    "expected fully_shard alone"
                )
            if p.is_complex() and p.requires_grad:
                return TypeError(
                    f"parameter {name!r} is {dtype_name(p.dtype)}, EF21Muon steps real ones; expected a torch optimizer, and "
                    "no optimizer="
                )
    try:
        optimizer.bind(_holders(held), 1, may_be_unused=True)
    except ValueError as error:
        return error
    return None


def shard(optimizer: EF21Muon, shards: Collectives, held: list[Unit], momentum: Codec) -> ShardedMuon:
    """Have a bound optimizer step these shards. `momentum` is the codec by which a matrix's momentum is sent to its owner."""
    hidden = {p for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    matrices = []
    for unit in held:
        shapes, parameters = unit.shapes(), unit.parameters()
        for name in (name for name in unit.names if parameters[name] in hidden):
            shape = tuple(shapes[name])
            matrices.append(Matrix(name, shape, shape, *unit.lengths(name), holder=name))
    sharded = ShardedMuon(optimizer, shards, matrices, _holders(held), momentum, local)
    optimizer.hold_shards(sharded)
    return sharded


def local(x: Tensor) -> Tensor:
    """Return this rank's part of a DTensor; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def _holders(held: list[Unit]) -> dict[str, Tensor]:
    return {name: p for unit in held for name, p in unit.parameters().items()}
