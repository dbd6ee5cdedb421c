"""FSDP2's records of the weights it has cut: which parameter it shows, and how to cut it again.

``fully_shard`` shows a module its whole weight around its forward and backward, and its own rows
otherwise: ``module._parameters["weight"]`` is swapped. Masks write the rows, so whatever whole copy
is still about (the root's after an evaluation, after ``unshard()``, under
``set_reshard_after_backward(False)``) goes before a write: the next forward gathers rows anew.

The records have no public name in torch; what is asked of them is all here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparseft.errors import AttachError
from sparseft.modules.leaf_reduction import LeafReduction
from sparseft.modules.weight_storage import is_sharded, unsupported_placement

__all__ = ["Sharding", "Shards", "settle_model", "shards_of"]

_STATES = "torch.distributed.fsdp._fully_shard._fsdp_state"
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"


class Shards:
    """One weight in FSDP2's hands.

    Args:
        record: torch's ``FSDPParam``.
        group: torch's ``FSDPParamGroup``, gathered and cut together.
    """

    def __init__(self, record: Any, group: Any) -> None:
        self._record, self._group = record, group

    def shows(self, tensor: object) -> bool:
        """Whether a tensor is this weight as FSDP2 puts it into its modules, cut or whole."""
        names = ("sharded_param", "_unsharded_param", "_sharded_post_forward_param")
        return any(tensor is getattr(self._record, name, None) for name in names)

    def settle(self) -> None:
        """Have the modules show the rows, and drop any whole copy of them. Not collective.

        Raises:
            AttachError: a forward is running.
        """
        group = self._group
        if group._all_gather_result is not None:
            group.wait_for_unshard()  # of unshard(async_op=True): rows from before the write
        if group.is_sharded:
            return
        group.reshard()
        if not group.is_sharded:
            raise AttachError(
                "a weight that fully_shard manages cannot be written while a forward of its module "
                "runs. Step the optimizer after the backward."
            )

    @property
    def mesh(self) -> Any:
        """Over which processes it is sharded and copied."""
        return self._record.sharded_param.device_mesh

    @property
    def reduces(self) -> bool:
        """Whether the next backward averages gradients, see set_requires_gradient_sync."""
        return bool(self._group.reduce_grads and self._group.all_reduce_grads)

    @property
    def offloaded(self) -> bool:
        """Whether its rows rest on the CPU and travel to a GPU for each forward."""
        return bool(self._record.offload_to_cpu)


def _groups(model: nn.Module) -> Iterator[Any]:
    states = sys.modules.get(_STATES)
    if states is None:  # nobody has called fully_shard
        return
    done = set()
    for module in model.modules():
        state = states._get_module_fsdp_state(module)
        if state is None or id(state) in done:
            continue
        done.add(id(state))
        several = getattr(state, "_fsdp_param_groups", None)  # from torch 2.12 on
        groups = [state._fsdp_param_group] if several is None else several
        yield from (group for group in groups if group is not None)


def settle_model(model: nn.Module) -> None:
    """Have every module of a model show its rows; nothing where there are none."""
    for group in _groups(model):
        for record in group.fsdp_params[:1]:
            Shards(record, group).settle()


def shards_of(model: nn.Module) -> dict[int, Shards]:
    """Return id of each parameter that ``fully_shard`` has cut -> its record."""
    return {
        id(record.sharded_param): Shards(record, group)
        for group in _groups(model)
        for record in group.fsdp_params
    }


class Sharding:
    """What ``fully_shard`` has done to a model, looked at when masks go on it; its rows show then.

    Args:
        model: what masks go on.

    Attributes:
        found: whether any of its parameters is cut.

    Raises:
        AttachError: it is under FSDP1.
    """

    def __init__(self, model: nn.Module) -> None:
        _refuse_flat_parameters(model)
        settle_model(model)
        self._model = model
        self._shards = shards_of(model)
        self.found = bool(self._shards)

    def of(self, parameter: nn.Parameter) -> Shards | None:
        """Return the record of a parameter that was cut."""
        return self._shards.get(id(parameter))

    def check_group(self, group: Any) -> None:
        """Raise AttachError where a sharded model is to be trained by this process alone."""
        if self.found and group is False:
            raise AttachError(
                "group=False says that this process trains alone, but fully_shard has cut the "
                "model over several, which gather it and reduce its diffs together. Leave group "
                "out, and attach on every rank; for a model of this rank alone load it whole."
            )

    def check(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Raise AttachError for a weight, by name, that is cut in a way masks cannot follow."""
        for name, weight in weights.items():
            if is_sharded(weight):
                _check_weight(name, weight, self.of(weight))

    def reduction(
        self, leaves: Iterable[nn.Parameter], full: Iterable[nn.Parameter]
    ) -> LeafReduction | None:
        """Return what averages the gradients that FSDP2 does not; None for a model without shards.

        Args:
            leaves: of the masks.
            full: what is trained densely, of which it takes what is not cut.
        """
        if not self._shards:
            return None
        plain = [p for p in full if not is_sharded(p)]
        group = _group_of(self._shards.values())
        return LeafReduction([*leaves, *plain], group, model=self._model)


def _group_of(shards: Iterable[Shards]) -> Any:
    """Return the process group over which the model is sharded and copied.

    Raises:
        AttachError: parts of it are over different ones.
    """
    meshes = {tuple(s.mesh.mesh.flatten().tolist()): s.mesh for s in shards}
    if len(meshes) > 1:
        raise AttachError(
            f"the model is sharded over {len(meshes)} sets of processes, "
            f"{' and '.join(map(str, meshes))}, but gradients of leaves are averaged over one. "
            "Call fully_shard with one mesh everywhere."
        )
    mesh = next(iter(meshes.values()))
    if mesh.size() == torch.distributed.get_world_size():
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def _check_weight(name: str, weight: nn.Parameter, found: Shards | None) -> None:
    wrong = unsupported_placement(weight)
    if wrong is not None:
        raise AttachError(
            f"{name!r} is placed as {wrong}; masks are on row shards, Shard(0) over one dimension "
            "of the mesh, as fully_shard makes them by default. Leave out shard_placement_fn for "
            "it, and tensor parallelism."
        )
    if found is None:
        raise AttachError(
            f"{name!r} is a DTensor that no fully_shard on a part of this model manages, as tensor "
            "parallelism makes them: its layer computes with its shards alone. Use fully_shard "
            "without parallelize_module, and attach to the model it was called on."
        )
    if found.offloaded:
        raise AttachError(
            f"{name!r} is sharded with CPUOffloadPolicy: its rows rest on the CPU and its layer "
            "computes elsewhere, so leaf and optimizer state would be in neither place. Leave out "
            "offload_policy: what masks train takes little memory."
        )


def _refuse_flat_parameters(model: nn.Module) -> None:
    """Raise AttachError for a model under FSDP1, whose weights are pieces of flat parameters."""
    loaded = sys.modules.get(_FSDP1)
    if loaded is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, loaded.FullyShardedDataParallel):
            raise AttachError(
                f"{name or 'the model'!r} is a FullyShardedDataParallel (FSDP1), which cuts "
                "weights as pieces of one flat parameter, where no mask fits. Use FSDP2: "
                "torch.distributed.fsdp.fully_shard(layer) for each layer, then for the model, "
                "then attach (with accelerate: fsdp_version: 2)."
            )
