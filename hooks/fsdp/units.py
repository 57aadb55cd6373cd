"""Units that FSDP2 communicates for, as torch 2.13 keeps them: everything that is read from FSDP's private parts is read here.

These are the process groups, the parameters that travel together with their shards, and which module is the root. `units`,
which attach calls first, raises an error with the missing name if something is not where torch 2.13 has it.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from commpress.comm.masks_index import of_pairs
from commpress.comm.parameters import bare_name
from commpress.comm.segments import Segment, Segments, sizes


@dataclass(frozen=True)
class Cut:
    """How FSDP cuts one parameter among the ranks that share it."""

    dim: int
    """The dimension that is cut."""
    values: int
    """Reals of the whole parameter."""
    length: int
    """Reals of one rank's shard, padding included."""


@dataclass
class Unit:
    """The parameters of one `fully_shard` call, which FSDP communicates together. `group` is torch's FSDPParamGroup."""

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
        policy, own = self.group.mp_policy, {p.sharded_param.dtype for p in self.group.fsdp_params}
        self.dtypes = own | ({policy.param_dtype, policy.reduce_dtype} - {None})
        """The dtypes in which FSDP gathers and reduces, and those of the shards."""
        self.parts()  # raises now if something is not where torch 2.13 has it
        self._touched: set[str] = set()
        self._layouts: dict[Segments, Segments] = {}

    @property
    def device(self) -> torch.device:
        """The device on which FSDP computes."""
        device: torch.device = self.group.device
        return device

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each whole parameter, by name."""
        return {name: p._orig_size for name, p in zip(self.names, self.group.fsdp_params, strict=True)}

    def cut(self, name: str) -> Cut:
        """Return how a parameter is cut among the ranks that share it."""
        p = self.group.fsdp_params[self.names.index(name)]
        return Cut(p.fsdp_placement.dim, p._orig_size.numel() * _reals(p), _part(p))

    def lengths(self, name: str) -> tuple[int, tuple[int, ...]]:
        """Return the dimension along which a parameter is cut, and how long each rank's shard is there, without padding."""
        p = self.group.fsdp_params[self.names.index(name)]
        dim, ranks = p.fsdp_placement.dim, range(dist.get_world_size(self.shard_groups[0]))
        whole, most = p._orig_size[dim], p.padded_sharded_param_size[dim]
        return dim, tuple(min(most, max(0, whole - r * most)) for r in ranks)

    def parameters(self) -> dict[str, Tensor]:
        """The sharded parameters, as the module and its optimizer have them, by name."""
        return {name: p.sharded_param for name, p in zip(self.names, self.group.fsdp_params, strict=True)}

    @property
    def offloads(self) -> bool:
        """Whether shards and their gradients are kept in another memory than that of the device that computes."""
        return isinstance(self.group.offload_policy, CPUOffloadPolicy)

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
        return tuple(Segment(name, _part(p)) for name, p in named if p.sharded_param.requires_grad)

    def gathered(self) -> Segments:
        """The parts of what FSDP gathers, as `full` has them: all parameters, trained or not."""
        named = zip(self.names, self.group.fsdp_params, strict=True)
        parts = tuple(Segment(name, _part(p)) for name, p in named)
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
        touched = tuple(segment for segment in trained if segment.name in self._touched)
        if ends:
            self._touched.clear()
        for parts in (trained, touched):
            if n == sum(sizes(parts)):
                return parts, ""
        return trained, f"{n} of {sum(sizes(trained))} values, of unknown parameters"

    def full(self, parts: Segments, chunks: int) -> Segments:
        """The parts of a full gradient: first those of rank 0's shard, then of that of rank 1, ..."""
        if parts not in self._layouts:
            self._layouts[parts] = tuple(Segment(f"{part.name}[{r}]", part.n) for r in range(chunks) for part in parts)
        return self._layouts[parts]

    def replace_replica_group(self, group: dist.ProcessGroup) -> None:
        """From now on FSDP averages over the replicas by this group's all_reduce."""
        self.group.mesh_info = copy.copy(self.group.mesh_info)  # other modules may have the same
        self.group.mesh_info.replicate_process_group = group


def units(model: nn.Module) -> list[Unit]:
    """The modules of a model that FSDP communicates for, in the order of `model.modules()`.

    Raises RuntimeError if this torch keeps them elsewhere, ValueError if the model is not sharded in a way that this knows.
    """
    prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    order = {name: place for place, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    found: dict[int, Unit] = {}
    try:
        root(model)()
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


def root(model: Any) -> Callable[[], bool | None]:
    """Return a function that says whether FSDP takes `model` for the root: None before the first forward.

    What FSDP knows is looked up once: torch.compile cannot trace a dict of weak references.
    """
    state = model._get_fsdp_state()
    return lambda: state._is_root


def ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The global ranks of a group: FSDP makes a group of its own for each module, of the same ranks."""
    return tuple(dist.get_process_group_ranks(group))


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
