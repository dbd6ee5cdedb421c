"""What the optimizers that write weights share: the loop over groups, leaves and parameters.

The rules, and what users see, are in :mod:`sparseft.optim`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparseft.modules.leaves import MaskedParameter, masked_by_leaf
from sparseft.modules.traced import once_while_traced
from sparseft.modules.weight_storage import is_sharded, local_value
from sparseft.ops import resolve_backend
from sparseft.ops._moments import scales_of
from sparseft.ops.sparse_step import sparse_step_

__all__ = ["SparseOptimizer", "check_at_least_zero", "check_betas", "check_decoupled"]

# torch.optim's switches that change the result and that we do not have.
_UNKNOWN_TO_US = ("amsgrad", "maximize")


def check_at_least_zero(owner: str, **values: float | Tensor) -> None:
    for name, value in values.items():
        if not float(value) >= 0.0:
            raise ValueError(f"{owner}: {name}={value}; it should be 0 or more.")


def check_betas(owner: str, betas: tuple[float, float]) -> None:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{owner}: {betas=}; each should be in [0, 1).")


def check_decoupled(owner: str, group: dict[str, Any]) -> None:
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"] != 0:
        raise ValueError(
            f"{owner}: a group has weight_decay={group['weight_decay']} with "
            "decoupled_weight_decay=False, which is Adam's L2 term in the gradient; here it would "
            "become decoupled decay. Go on with torch.optim.Adam, or set weight_decay=0 there."
        )


class _Kind(NamedTuple):
    """What tensors of one call of the op have in common."""

    backend: str | None
    device: torch.device
    masked: bool
    contiguous: bool
    moments: tuple[str, ...]  # SGD may have momentum in one group and none in another
    moment_bits: int
    seed: int | None  # None: round to nearest


class _Entry(NamedTuple):
    parameter: Tensor
    grad: Tensor  # of a sharded parameter its own rows, as everything the op is given
    masked: MaskedParameter | None  # whose weight the op writes
    group: int
    number: int  # position among all parameters of the optimizer
    rows: MaskedParameter | None  # whose sharded weight is written after the op


class SparseOptimizer(Optimizer, ABC):
    """The loop over groups, leaves and ordinary parameters; a rule adds its hyper-parameters."""

    # The hook after each step leaves the writing to us.
    writes_masked_weights: ClassVar[bool] = True
    # GradScaler then hands over `grad_scale` and `found_inf` as tensors and never waits for them.
    _step_supports_amp_scaling: ClassVar[bool] = True
    _rule: ClassVar[str]
    _all_moments: ClassVar[tuple[str, ...]]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._check_group(defaults)
        check_at_least_zero(type(self).__name__, lr=defaults["lr"])
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch does, with options checked as the constructor's.

        Raises:
            ValueError: an option out of range, or one of torch's that would be ignored here.
        """
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            self._check_group(options)
            check_at_least_zero(type(self).__name__, lr=options["lr"])
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a group's options, all there, cannot be honoured.

        Of the lr, which schedulers may bring to a rounding error below 0, no loaded state is held
        to be wrong.
        """
        owner = type(self).__name__
        for name in _UNKNOWN_TO_US:
            if group.get(name):
                raise ValueError(
                    f"{owner}: a group has {name}=True, which would be ignored here; use the "
                    "torch.optim class that has it."
                )
        if group["moment_bits"] not in (8, 32):
            raise ValueError(f"{owner}: moment_bits={group['moment_bits']}; it should be 8 or 32.")
        check_at_least_zero(owner, weight_decay=group["weight_decay"])

    @abstractmethod
    def _hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        """Return a group's row as `sparseft.ops.sparse_step.HYPER` names it, without the lr."""

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the moments that a group keeps."""
        return self._all_moments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step on every parameter that has a gradient.

        Two attributes are honoured, as by torch's fused optimizers, where set (GradScaler sets
        them): tensors ``grad_scale``, by which gradients are divided (the gradients themselves stay
        as they are), and ``found_inf``, which skips the step where it is not 0.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            StackOrderError: something was applied on top of a masked weight since `attach`.
            BackendError: an attachment asked for ``"triton"``, which cannot run here.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        compiling = torch.compiler.is_compiling()
        if compiling:
            _start_states(self)
        batches = self._collect(recheck=closure is not None)
        if not batches:
            return loss
        if not compiling:
            self._check_capture(batches)
        hyper: list[float] = []
        rates: list[Tensor | None] = []
        for group in self.param_groups:
            lr = group["lr"]
            if compiling:
                # An input of the graph: as a constant in it, each new value would be compiled.
                # fp64 keeps the bits of a float.
                # (As a product: a scalar argument would be specialised on.)
                device = next(iter(batches)).device
                one = torch.ones((), dtype=torch.float64, device=device)
                lr = lr if isinstance(lr, Tensor) else one * lr
            as_tensor = isinstance(lr, Tensor) and (compiling or lr.device.type != "cpu")
            rates.append(lr if as_tensor else None)
            hyper += (0.0 if as_tensor else float(lr), *self._hyper(group))
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        factor = None if scale is None else torch.as_tensor(scale, dtype=torch.float32).reciprocal()
        for kind, entries in batches.items():
            self._run(kind, entries, hyper, rates, factor, found_inf)
            for entry in entries:
                if entry.rows is not None:
                    self._write_rows(entry, entry.rows, kind.seed)
        return loss

    def _write_rows(self, entry: _Entry, masked: MaskedParameter, seed: int | None) -> None:
        """Write this process's rows of a sharded weight, whose leaf has been updated."""
        if seed is None:
            masked.write_()
        else:
            step = int(self.state[entry.parameter]["step"])  # waits for a GPU that counts them
            masked.write_stochastically_(seed=seed, tensor=entry.number, step=step)

    def _check_capture(self, kinds: Iterable[_Kind]) -> None:
        if not any(kind.device.type == "cuda" for kind in kinds):
            return
        if torch.cuda.is_current_stream_capturing() and not all(
            group["capturable"] for group in self.param_groups
        ):
            raise RuntimeError(
                f"{type(self).__name__}: this step is being captured in a CUDA graph, but "
                "capturable=False; build the optimizer with capturable=True."
            )

    def _collect(self, *, recheck: bool) -> dict[_Kind, list[_Entry]]:
        """Sort what has a gradient by what one call of the op can take."""
        batches: dict[_Kind, list[_Entry]] = {}
        number = -1
        for index, group in enumerate(self.param_groups):
            moments = self._moments(group)
            seed = group["seed"] if group["stochastic_rounding"] else None
            bits = group["moment_bits"]
            for parameter in group["params"]:
                number += 1
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} got a torch.sparse gradient for a parameter of "
                        f"shape {tuple(parameter.shape)}; make the layer with sparse=False."
                    )
                masked = masked_by_leaf(parameter)
                grad = parameter.grad
                if is_sharded(parameter):
                    self._check_sharded(parameter, bits, number)
                    grad = local_value(grad)
                weight, backend, rows = parameter, None, None
                if masked is not None:
                    # The hook before each step has checked this, but a closure ran since.
                    if recheck:
                        masked.require_top("take an optimizer step on")
                    masked.follow_weight_()
                    backend = masked.backend
                    if masked.shards is not None:
                        masked, rows = None, masked
                    elif masked.separate:
                        masked = None  # there is nothing to write
                    else:
                        weight = masked.weight
                if grad.dtype != parameter.dtype:  # torch allows it through Tensor.grad_dtype
                    grad = grad.to(parameter.dtype)
                contiguous = (
                    grad.is_contiguous() and weight.is_contiguous() and parameter.is_contiguous()
                )
                kind = _Kind(
                    backend, parameter.device, masked is not None, contiguous, moments, bits, seed
                )  # fmt: skip
                entry = _Entry(parameter, grad, masked, index, number, rows)
                batches.setdefault(kind, []).append(entry)
        return batches

    def _run(
        self,
        kind: _Kind,
        entries: list[_Entry],
        hyper: list[float],
        rates: list[Tensor | None],
        factor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        values = [local_value(e.parameter) for e in entries]
        touched = [*values, *(e.grad for e in entries)]
        if kind.masked:
            touched += [e.masked.weight for e in entries if e.masked is not None]
        if torch.compiler.is_compiling():
            # The op chooses when it runs; steps are counted where a kernel would count them.
            backend, on_device = kind.backend or "", kind.device.type != "cpu"
            rates = [r if r is None else r.to(kind.device, non_blocking=True) for r in rates]
        else:
            backend = resolve_backend("sparse_step_", *touched, backend=kind.backend)
            on_device = backend == "triton"
        columns: list[list[Tensor]] = [[] for _ in range(4)]
        steps = []
        for entry in entries:
            state = self._state(entry, kind, on_device=on_device)
            steps.append(state["step"])
            for place, name in enumerate(kind.moments):
                columns[place].append(local_value(state[_key(name, kind.moment_bits)]))
                if kind.moment_bits == 8:
                    columns[2 + place].append(state[f"{name}_scale"])
        written = [e.masked for e in entries if e.masked is not None]
        sparse_step_(
            self._rule,
            values,
            [e.grad for e in entries],
            *columns,
            [m.weight for m in written],
            [m.base for m in written],
            [m.indices for m in written],
            steps,
            [e.group for e in entries],
            [e.number for e in entries],
            hyper,
            rates,
            _scalar(factor, kind.device),
            _scalar(found_inf, kind.device),
            kind.seed,
            backend,
        )

    def _check_sharded(self, p: Tensor, bits: int, number: int) -> None:
        if bits == 8:
            raise ValueError(
                f"{type(self).__name__}: parameter {number} of shape {tuple(p.shape)} is sharded, "
                "and blocks of 8-bit moments would not end where its rows do. Put parameters that "
                "fully_shard has cut into a group of their own, with moment_bits=32."
            )

    def _state(self, entry: _Entry, kind: _Kind, *, on_device: bool) -> dict[str, Any]:
        """Return a parameter's state, made at its first step and checked at each."""
        p, names = entry.parameter, [_key(name, kind.moment_bits) for name in kind.moments]
        state = self.state[p]
        if "step" not in state or any(state.get(name) is None for name in names):
            self._check_warm(p)
            self._check_bits(state, kind.moments, kind.moment_bits, entry.number)
            group = self.param_groups[entry.group]
            self._start(state, p, kind, on_device=on_device or group["capturable"])
        step = state["step"]
        if on_device and (step.device != p.device or step.dtype != torch.float32):
            state["step"] = step.to(p.device, torch.float32, non_blocking=True)
        for place, name in enumerate(names):
            moment = state[name]
            dtype = _code_dtype(place) if kind.moment_bits == 8 else p.dtype
            if moment.shape != p.shape or moment.dtype != dtype or moment.device != p.device:
                raise ValueError(
                    f"{type(self).__name__}: state {name!r} of parameter {entry.number} is "
                    f"{moment.dtype} {tuple(moment.shape)} on {moment.device}; the parameter and "
                    f"moment_bits={kind.moment_bits} want {dtype} {tuple(p.shape)} on {p.device}. "
                    "Load a state dict of these parameters, after moving the model."
                )
        return state

    def _check_warm(self, p: Tensor) -> None:
        if torch.compiler.is_compiling() or p.device.type != "cuda":
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}: the first step of a parameter is being captured in a CUDA "
                "graph, whose replays would set its moments to zero each time. Take a step (or "
                "load a state) before the capture."
            )

    def _check_bits(
        self, state: dict[str, Any], names: Iterable[str], bits: int, number: int
    ) -> None:
        """Raise ValueError where a parameter's moments are there in the other precision."""
        other = 32 if bits == 8 else 8
        for key in (_key(name, other) for name in names):
            if state.get(key) is not None:
                raise ValueError(
                    f"{type(self).__name__}: the state of parameter {number} has {other}-bit "
                    f"moments ({key!r}), its group moment_bits={bits}; build the optimizer with "
                    f"moment_bits={other} to go on from this state."
                )

    def _start(self, state: dict[str, Any], p: Tensor, kind: _Kind, *, on_device: bool) -> None:
        names = kind.moments
        missing = [n for n in names if state.get(_key(n, kind.moment_bits)) is None]
        # A state of torch.optim.SGD counts no steps; its buffer then is past the first. A buffer
        # made later (momentum switched on) starts over.
        started = 0.0 if missing or not names else 1.0
        if "step" not in state:
            # On a CPU unless the kernel counts, as torch.optim keeps it: read without a sync.
            where = p.device if on_device else torch.device("cpu")
            state["step"] = torch.full((), started, device=where)
        elif missing:
            state["step"].zero_()
        for place, name in enumerate(names):
            if name not in missing:
                continue
            if kind.moment_bits == 32:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            else:
                codes = torch.zeros(p.shape, dtype=_code_dtype(place), device=p.device)
                state[_key(name, 8)] = codes
                state[f"{name}_scale"] = torch.zeros(scales_of(p.numel()), device=p.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Checked first: a state that is refused leaves the optimizer as it was.
        defaults = state["defaults"] if "defaults" in state else self.defaults
        number = -1
        for group in state["param_groups"]:
            for name, default in defaults.items():
                group.setdefault(name, default)
            self._check_group(group)
            if "decoupled_weight_decay" in group:
                group["decoupled_weight_decay"] = True  # False, without decay, says the same
            for p in group["params"]:
                number += 1
                self._check_state(state["state"].get(p, {}), group, number)
        super().__setstate__(state)

    def _check_state(self, state: dict[str, Any], group: dict[str, Any], number: int) -> None:
        keys = {"step", *(k for n in self._all_moments for k in (n, f"{n}_code", f"{n}_scale"))}
        if strange := sorted(set(state) - keys):
            raise ValueError(
                f"{type(self).__name__}: the state of parameter {number} has {strange[0]!r}, which "
                "would be ignored here; go on with the class that made it."
            )
        self._check_bits(state, self._moments(group), group["moment_bits"], number)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, ours or torch.optim's of the same rule.

        Raises:
            ValueError: other groups or parameters; moments of another rule or precision; options
                that would be ignored (``amsgrad``, ``maximize``, the coupled decay of Adam). The
                optimizer then stays as it was.
        """
        super().load_state_dict(state_dict)
        # torch casts all state to the parameter's dtype; codes and their scales are put back.
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, p in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    if name.endswith(("_scale", "_code")):
                        self.state[p][name] = value.to(p.device, copy=True)


# In a compiled step this runs while it is traced, before the graph's inputs are looked up. Moments
# made inside a graph would be its outputs, and make a second graph of the second step; those here
# are ordinary tensors, whose addresses a CUDA graph may rely on.
@once_while_traced
def _start_states(optimizer: SparseOptimizer) -> bool:
    for kind, entries in optimizer._collect(recheck=False).items():
        for entry in entries:
            state = optimizer._state(entry, kind, on_device=kind.device.type != "cpu")
            if kind.device.type == "cpu":
                continue
            written = [] if entry.masked is None else [entry.masked.weight]
            for x in (*state.values(), *written):
                if isinstance(x, Tensor):
                    torch._dynamo.mark_static_address(x, guard=True)
    return True


def _code_dtype(place: int) -> torch.dtype:
    return (torch.int8, torch.uint8)[place]  # first moments are signed


def _key(moment: str, bits: int) -> str:
    """Return a moment's key in ``state``. Codes have one of their own: under its name torch.optim
    would take them for the moment.
    """
    return moment if bits == 32 else f"{moment}_code"


def _scalar(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device, torch.float32, non_blocking=True).reshape(())
