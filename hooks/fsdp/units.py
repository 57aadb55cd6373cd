"""Units, the modules that FSDP2 communicates for. This file alone reads FSDP's private attributes, as torch 2.13 has them.

It reads the process groups, the parameters that are sent together, their shards, and which module is the root. `attach` calls
`units` first, which raises an error with the missing name if an attribute is not where torch 2.13 has it.
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
    """Number of real values in the whole parameter; a complex value counts as two."""
    length: int
    """Number of real values in one rank's shard, padding included."""


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
        """The group that holds the shards, and the group over which FSDP may shard again after forward."""
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
        """The dtypes in which FSDP gathers and reduces, and the dtypes of the shards."""
        self.parts()  # raises AttributeError now if an attribute is not where torch 2.13 has it
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
        """Return the dimension along which a parameter is cut, and the length of each rank's shard there, without padding."""
        p = self.group.fsdp_params[self.names.index(name)]
        dim, ranks = p.fsdp_placement.dim, range(dist.get_world_size(self.shard_groups[0]))
        whole, most = p._orig_size[dim], p.padded_sharded_param_size[dim]
        return dim, tuple(min(most, max(0, whole - r * most)) for r in ranks)

    def parameters(self) -> dict[str, Tensor]:
        """Return the sharded parameters, as the module and its optimizer hold them, by name."""
        return {name: p.sharded_param for name, p in zip(self.names, self.group.fsdp_params, strict=True)}

    @property
    def offloads(self) -> bool:
        """Whether shards and their gradients are kept in CPU memory, away from the device that computes."""
        return isinstance(self.group.offload_policy, CPUOffloadPolicy)

    def trained_parameters(self) -> list[Tensor]:
        """Return the shards of the parameters that require a gradient now."""
        return [p.sharded_param for p in self.group.fsdp_params if p.sharded_param.requires_grad]

    def trained_shards(self) -> dict[str, Tensor]:
        """Return this rank's local shards of the parameters that require a gradient now, by name."""
        named = zip(self.names, self.group.fsdp_params, strict=True)
        return {name: p.sharded_param.to_local() for name, p in named if p.sharded_param.requires_grad}

    def parts(self) -> Segments:
        """Return the parameters that require a gradient now: name, and real values of one rank's shard, padding included."""
        named = zip(self.names, self.group.fsdp_params, strict=True)
        return tuple(Segment(name, _part(p)) for name, p in named if p.sharded_param.requires_grad)

    def gathered(self) -> Segments:
        """Return the parts of what FSDP gathers, in the order of `full`: all parameters, trained or not."""
        named = zip(self.names, self.group.fsdp_params, strict=True)
        parts = tuple(Segment(name, _part(p)) for name, p in named)
        return self.full(parts, dist.get_world_size(self.shard_groups[0]))

    def chunks(self, name: str, mask: Tensor) -> list[Tensor]:
        """Return the mask of each rank's shard of a parameter: bool [n] for its n real values, padding included."""
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
        """Note which parameters get a gradient: FSDP reduces only these, and does not name them."""

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
        """Return the parts of a gradient with `n` real values a rank, and an empty string.

        If the size fits neither all trained parameters nor those that got a gradient, the parts are unknown: returns all
        trained ones, and the reason not to compress. `ends`: this is the last call in this backward.
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
        """Return the parts of a full gradient: first the parts of rank 0's shard, then those of rank 1's, and so on."""
        if parts not in self._layouts:
            self._layouts[parts] = tuple(Segment(f"{part.name}[{r}]", part.n) for r in range(chunks) for part in parts)
        return self._layouts[parts]

    def replace_replica_group(self, group: dist.ProcessGroup) -> None:
        """Have FSDP average over the replicas by this group's all_reduce from now on."""
        self.group.mesh_info = copy.copy(self.group.mesh_info)  # other modules may share the object
        self.group.mesh_info.replicate_process_group = group


def units(model: nn.Module) -> list[Unit]:
    """Return the units of a model, in the order of `model.modules()`.

    Raises RuntimeError if this version of torch keeps them elsewhere, ValueError if the model is not sharded, is only
    replicated, or has a module with parameters on several meshes.
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
    """Return a function that says whether `model` is FSDP's root module; the function returns None before the first forward.

    FSDP's state is looked up once, here: torch.compile cannot trace a dict of weak references.
    """
    state = model._get_fsdp_state()
    return lambda: state._is_root


def ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    """Return the global ranks of a group. FSDP may make several groups of the same ranks, one for each module."""
    return tuple(dist.get_process_group_ranks(group))


def _name(info: Any, prefixes: Mapping[nn.Module, str], order: Mapping[str, int]) -> str:
    """Return the bare name of a parameter; of a tied one the first in `named_parameters`."""
    places = zip([info.module, *info.shared_modules], [info.param_name, *info.shared_param_names], strict=True)
    full = [prefixes[module] + name for module, name in places]
    return bare_name(min(full, key=lambda name: order.get(name, len(order))))


def _part(p: Any) -> int:
    """Return the number of real values in one rank's shard of `p` (torch's FSDPParam), padding included."""
    return int(p.padded_sharded_param_size.numel()) * _reals(p)


def _reals(p: Any) -> int:
    """Return 2 for a complex parameter, else 1."""
    return 2 if p.sharded_param.is_complex() else 1
