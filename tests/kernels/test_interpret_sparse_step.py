"""The fused optimizer step: as accurate as torch, W written once and never read, any packing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from sparseft import ops
from sparseft.ops._moments import QUANTUM, decode_moment, scales_of
from sparseft.ops.sparse_step import HYPER, sparse_step_

pytestmark = pytest.mark.usefixtures("poisoned_launcher")
LANES = [
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpret"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Around one block of 1024 entries and one quantum of 256, one entry, and none.
SIZES = (0, 1, 257, 1024, 1025, 2600)
# Two groups of each rule: lr, weight_decay, a, b, eps, nesterov.
GROUPS = {
    "adamw": ((1e-2, 0.1, 0.9, 0.999, 1e-8, 0.0), (3e-3, 0.0, 0.6, 0.95, 1e-6, 0.0)),
    "sgd": ((1e-1, 0.1, 0.9, 0.3, 0.0, 0.0), (1e-2, 0.0, 0.8, 0.0, 0.0, 1.0)),
    "plain": ((1e-1, 0.1, 0.0, 0.0, 0.0, 0.0), (1e-2, 0.0, 0.0, 0.0, 0.0, 0.0)),
    "lion": ((1e-2, 0.1, 0.9, 0.99, 0.0, 0.0), (3e-3, 0.0, 0.6, 0.95, 0.0, 0.0)),
}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INTEGER[x.element_size()])


@dataclass
class Scene:
    """Tensors of one call, all with a step behind them unless fresh."""

    rule: str
    values: list
    grads: list
    firsts: list
    seconds: list
    weights: list
    bases: list
    indices: list
    steps: list
    groups: list
    ids: list
    first_scales: list = field(default_factory=list)
    second_scales: list = field(default_factory=list)

    LISTS = ("values", "grads", "firsts", "seconds", "first_scales", "second_scales", "weights",
             "bases", "indices", "steps")  # fmt: skip

    def copy(self, dtype: torch.dtype | None = None) -> Scene:
        """A copy; with ``dtype`` its floating vectors are of that dtype, and no weight is kept."""
        lists = {}
        for name in self.LISTS:
            tensors = [t.clone() for t in getattr(self, name)]
            if dtype is not None and name in ("values", "grads", "firsts", "seconds"):
                tensors = [t.to(dtype) for t in tensors]
            if dtype is not None and name in ("weights", "bases", "indices"):
                tensors = []
            lists[name] = tensors
        return Scene(rule=self.rule, groups=self.groups, ids=self.ids, **lists)

    def step(self, backend: str, **options) -> None:
        groups = GROUPS[self.rule]
        options.setdefault("lr", [None] * len(groups))
        sparse_step_(
            {"plain": "sgd"}.get(self.rule, self.rule), self.values, self.grads, self.firsts,
            self.seconds, self.first_scales, self.second_scales, self.weights, self.bases,
            self.indices, self.steps, self.groups, self.ids, [h for row in groups for h in row],
            options["lr"], options.get("grad_scale"), options.get("found_inf"),
            options.get("seed"), backend,
        )  # fmt: skip

    def pick(self, order: list[int]) -> Scene:
        """The same tensor objects, some of them, in another order."""
        lists = {n: [getattr(self, n)[t] for t in order if getattr(self, n)] for n in self.LISTS}
        groups, ids = ([x[t] for t in order] for x in (self.groups, self.ids))
        return Scene(rule=self.rule, groups=groups, ids=ids, **lists)

    def state(self) -> list[torch.Tensor]:
        return [t for name in self.LISTS for t in getattr(self, name)]


def scene(
    rule: str,
    device: str,
    dtypes=(torch.bfloat16,),
    sizes=SIZES,
    *,
    fresh: bool = False,
    index_dtype: torch.dtype = torch.int32,
) -> Scene:
    out = Scene(rule, *([] for _ in range(10)))
    for t, n in enumerate(sizes):
        dtype = dtypes[t % len(dtypes)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        numel = n + n // 2 + 5
        indices = torch.randperm(numel)[:n].sort().values
        weight = torch.randn(numel).to(dtype)
        out.bases.append(weight[indices].to(device))
        # Masked entries are written, never read; a NaN beside them keeps its payload.
        weight[indices] = float("nan")
        out.weights.append(weight.to(device))
        out.indices.append(indices.to(device, index_dtype))
        size = 10.0 ** torch.randint(-3, 2, (n,))
        out.values.append((torch.randn(n) * 0.01).to(device, wide))
        out.grads.append((torch.randn(n) * size).to(device, wide))
        out.firsts.append((torch.randn(n) * size).to(device, wide))
        out.seconds.append((torch.rand(n) * size**2).to(device, wide))
        out.steps.append(torch.tensor(0.0 if fresh else float(t + 1), device=device))
        out.groups.append(t % 2)
        out.ids.append(3 * t)
    if rule != "adamw":
        out.seconds = []
    if rule == "plain":
        out.firsts = []
    if fresh:
        for moment in (*out.firsts, *out.seconds):
            # what SGD's first step must not read; the others start at zero
            moment.fill_(float("nan") if rule == "sgd" else 0.0)
    return out


def regrade(*scenes: Scene) -> None:
    """Give every scene the same new gradients."""
    for grads in zip(*(s.grads for s in scenes), strict=True):
        new = torch.randn(grads[0].shape) * 10.0 ** torch.randint(-3, 2, grads[0].shape)
        for grad in grads:
            grad.copy_(new)


def test_constants_agree():
    sparse_step = pytest.importorskip("sparseft_kernels.sparse_step", reason="no Triton")
    assert sparse_step.QUANTUM == QUANTUM
    assert sparse_step.HYPER == HYPER
    assert sparse_step.OPTIMIZER.block % QUANTUM == 0


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("fresh", [False, True], ids=["going", "fresh"])
@pytest.mark.parametrize("rule", GROUPS)
def test_as_accurate_as_torch(rule, fresh, device, assert_as_accurate):
    """Several tensors, two groups, three weight dtypes, three steps against float64."""
    mine = scene(rule, device, DTYPES, fresh=fresh)
    theirs, exact = mine.copy(torch.float32), mine.copy(torch.float64)
    before = [w.clone() for w in mine.weights]
    for _ in range(3):
        regrade(mine, theirs, exact)
        mine.step("triton")
        theirs.step("reference")
        exact.step("reference")
    assert [float(s) for s in mine.steps] == [float(s) for s in exact.steps]
    for name in ("values", "firsts", "seconds"):
        columns = (getattr(s, name) for s in (mine, theirs, exact))
        for t, (a, b, c) in enumerate(zip(*columns, strict=True)):
            assert_as_accurate(a, b, c, name=f"{name}[{t}] of {SIZES[t]}")
    for t, weight in enumerate(mine.weights):
        at = mine.indices[t].long()
        written = (mine.bases[t].float() + mine.values[t]).to(weight.dtype)
        assert torch.equal(bits(weight[at]), bits(written))
        weight[at] = before[t][at]
        assert torch.equal(bits(weight), bits(before[t])), "a frozen entry changed"


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("rule", GROUPS)
def test_float64_weights(rule, device):
    mine = scene(rule, device, [torch.float64], index_dtype=torch.int64)
    theirs = mine.copy()
    for _ in range(2):
        regrade(mine, theirs)
        mine.step("triton")
        theirs.step("reference")
    for a, b in zip(mine.values, theirs.values, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    for w, u, b, i in zip(mine.weights, mine.values, mine.bases, mine.indices, strict=True):
        assert torch.equal(w[i], b + u)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", GROUPS)
def test_ordinary_parameters(rule, dtype, device, assert_as_accurate):
    """No weight to write; values and moments in the parameter's own dtype."""
    mine = scene(rule, device).copy(dtype)
    theirs, exact = mine.copy(), mine.copy(torch.float64)
    for s in (mine, theirs, exact):
        s.step("triton" if s is mine else "reference")
    for name in ("values", "firsts", "seconds"):
        columns = (getattr(s, name) for s in (mine, theirs, exact))
        for a, b, c in zip(*columns, strict=True):
            assert a.dtype == dtype
            assert_as_accurate(a, b, c, name=name)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("rule", GROUPS)
def test_found_inf_skips_the_step_and_its_count(rule, device):
    mine = scene(rule, device, DTYPES, fresh=True)
    kept = mine.copy()
    mine.grads[-1][5] = float("inf")
    grads = [g.clone() for g in mine.grads]
    mine.step("triton", found_inf=torch.ones((), device=device))
    for mine_, kept_, name in zip(mine.state(), kept.state(), range(99), strict=False):
        if not any(mine_ is g for g in mine.grads):
            assert torch.equal(bits(mine_), bits(kept_)), name
    # The skipped first step was none: SGD's buffer still starts as the first gradient.
    for s in (mine, kept):
        for g, new in zip(s.grads, grads, strict=True):
            g.copy_(new.nan_to_num(posinf=1.0))
    mine.step("triton", found_inf=torch.zeros((), device=device))
    kept.step("triton")
    for a, b in zip(mine.state(), kept.state(), strict=True):
        assert torch.equal(bits(a), bits(b))
    assert all(float(s) == 1.0 for s in mine.steps)


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("rule", GROUPS)
def test_grad_scale_and_lr_may_be_device_scalars(rule, device):
    mine = scene(rule, device)
    theirs = mine.copy()
    for grad in mine.grads:
        grad.mul_(64.0)
    rates = [torch.tensor(row[0], device=device, dtype=torch.float64) for row in GROUPS[rule]]
    mine.step("triton", grad_scale=torch.tensor(1 / 64, device=device), lr=[rates[0], None])
    theirs.step("triton")
    for a, b in zip(mine.values, theirs.values, strict=True):
        assert torch.equal(a, b)
    rates[0].fill_(0.0)
    held = [u.clone() for u in mine.values]
    mine.step("triton", lr=[rates[0], rates[1]])
    assert all(torch.equal(a, b) for a, b in zip(mine.values[::2], held[::2], strict=True))
    if rule != "sgd":
        assert not torch.equal(mine.values[5], held[5])


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_packing_does_not_matter(rule, device):
    """All at once, in another order, one by one: the same bits, stochastic rounding included."""
    together = scene(rule, device, DTYPES)
    order = [4, 0, 2, 1, 5, 3]
    shuffled, single = together.copy().pick(order), together.copy()
    together.step("triton", seed=11)
    shuffled.step("triton", seed=11)
    for t in range(len(SIZES)):
        single.pick([t]).step("triton", seed=11)
    for other in (shuffled, single.pick(order)):
        for a, b in zip(together.pick(order).state(), other.state(), strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_vectors_at_odd_addresses(index_dtype, device):
    """Gradients that are views into a bucket, as DDP makes them, start at any multiple of 4."""
    mine = scene("adamw", device, DTYPES, index_dtype=index_dtype)
    theirs = mine.copy()
    for t, grad in enumerate(mine.grads):
        bucket = torch.zeros(grad.numel() + 3, device=device)
        mine.grads[t] = bucket[1 + t % 2 : 1 + t % 2 + grad.numel()].copy_(grad)
    mine.step("triton")
    theirs.step("triton")
    for a, b in zip(mine.state(), theirs.state(), strict=True):
        assert torch.equal(bits(a), bits(b))


def one_weight(values: torch.Tensor, dtype: torch.dtype, device: str) -> Scene:
    """A plain SGD tensor whose step changes nothing: W becomes round(base + values)."""
    n = values.numel()
    return Scene(
        "plain", [values.to(device)], [torch.zeros(n, device=device)], [], [],
        [torch.zeros(n, dtype=dtype, device=device)], [torch.zeros(n, dtype=dtype, device=device)],
        [torch.arange(n, dtype=torch.int32, device=device)], [torch.zeros((), device=device)],
        [1], [5],
    )  # fmt: skip


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_the_reference_s_and_unbiased(dtype, device):
    n = 4096
    exact = torch.full((n,), 1 + 0.3 * torch.finfo(dtype).eps)
    mine = one_weight(exact, dtype, device)
    drawn = []
    for _ in range(2):  # each step draws anew
        theirs = mine.copy()
        mine.step("triton", seed=(3 << 32) + 9)
        theirs.step("reference", seed=(3 << 32) + 9)
        assert torch.equal(mine.weights[0], theirs.weights[0])
        up = (mine.weights[0] > 1).cpu()
        assert torch.equal(mine.weights[0][up], torch.full((1,), 1 + torch.finfo(dtype).eps,
                           dtype=dtype, device=device).expand(int(up.sum())))  # fmt: skip
        # five standard deviations of a binomial mean
        assert abs(float(up.double().mean()) - 0.3) < 5 * math.sqrt(0.21 / n)
        drawn.append(up)
    both = float((drawn[0] & drawn[1]).double().mean())
    assert abs(both - 0.09) < 5 * math.sqrt(0.09 * 0.91 / n), "steps are not independent"


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_of_every_size(dtype, device):
    """Subnormals, overflow, infinities, NaN; what the dtype has stays, signs do too."""
    tiny = torch.finfo(dtype).smallest_normal
    held = torch.randn(500).to(dtype).float()
    values = torch.cat([
        held, torch.randn(1000) * 10.0 ** torch.randint(-9, 5, (1000,)), torch.randn(500) * tiny,
        torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), tiny, -tiny / 2]),
        torch.tensor([65504.0, 65519.0, 3.3895e38, -3.3895e38]),
    ])  # fmt: skip
    mine = one_weight(values, dtype, device)
    theirs = mine.copy()
    mine.step("triton", seed=1)
    theirs.step("reference", seed=1)
    got, wanted = mine.weights[0], theirs.weights[0]
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))
    assert torch.equal(got[:500].float().cpu(), held)
    finite = got.isfinite().cpu()
    near = values.to(dtype)
    step = torch.nextafter(near.float().abs().to(dtype), torch.tensor(float("inf"), dtype=dtype))
    gap = (step.float() - near.float().abs())[finite]
    assert ((got.float().cpu() - values).abs()[finite] <= gap).all()


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("rule", ["adamw", "sgd", "lion"])
def test_eight_bit_moments(rule, device, assert_as_accurate):
    mine = scene(rule, device, DTYPES)
    for names, scales, dtype in (
        ("firsts", "first_scales", torch.int8),
        ("seconds", "second_scales", torch.uint8),
    ):
        info = torch.iinfo(dtype)
        moments = getattr(mine, names)
        low = max(info.min, -127)
        codes = [torch.randint(low, info.max, m.shape, dtype=dtype).to(device) for m in moments]
        setattr(mine, names, codes)
        for code in codes[-1:]:
            code[7] = 0
        setattr(mine, scales, [torch.rand(scales_of(m.numel())).to(device) for m in moments])
    mine.grads[-1][7] = 1e-9  # a second moment of 1e-21
    theirs, exact = mine.copy(), mine.copy()
    exact.values, exact.grads = ([t.double() for t in x] for x in (exact.values, exact.grads))
    exact.weights = exact.bases = exact.indices = []
    for s, backend in ((mine, "triton"), (theirs, "reference"), (exact, "reference")):
        s.step(backend)
    for a, b, c in zip(mine.values, theirs.values, exact.values, strict=True):
        assert_as_accurate(a, b, c, name="values")
    for names, scales in (("firsts", "first_scales"), ("seconds", "second_scales")):
        columns = [getattr(s, n) for s in (mine, theirs) for n in (names, scales)]
        for c, s, d, r in zip(*columns, strict=True):
            torch.testing.assert_close(s, r, rtol=1e-6, atol=0)
            # sums one ulp apart may fall on either side of half a code
            apart = (c.int() - d.int()).abs()
            assert apart.numel() == 0 or int(apart.max()) <= 1
            assert int((apart > 0).sum()) <= 1 + c.numel() // 100
            assert not decode_moment(c.cpu(), s.cpu()).isnan().any()
    for code in mine.seconds:
        assert (code > 0).all(), "a second moment became zero"


@pytest.mark.parametrize("device", LANES)
def test_single_tensor_functions_use_the_kernel(device, monkeypatch, assert_as_accurate):
    from sparseft_kernels import sparse_step

    launched = []
    launch_step = sparse_step.launch_step
    monkeypatch.setattr(
        sparse_step, "launch_step", lambda rule, *a: (launched.append(rule), launch_step(rule, *a))
    )
    options = {
        "adamw": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3},
        "sgd": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "first": False},
        "lion": {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1},
    }
    for rule, rest in options.items():
        results = []
        s = scene(rule, device, [torch.bfloat16], sizes=(1500,))
        for backend, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
            c = s.copy()
            if dtype is not None:
                for x in (c.values, c.grads, c.firsts, c.seconds):
                    x[:] = [t.to(dtype) for t in x]
            vectors = (c.values[0], c.grads[0], c.firsts[0], *c.seconds[:1])
            getattr(ops, f"{rule}_step_")(
                *vectors, c.weights[0], c.bases[0], c.indices[0],
                lr=1e-2, grad_scale=0.25, backend=backend, **rest,
            )  # fmt: skip
            results.append(c.values[0])
        assert_as_accurate(*results, name=rule)
    assert launched == list(options)


@pytest.mark.parametrize("device", LANES)
def test_tables_are_uploaded_once_per_set_of_addresses(device, monkeypatch):
    from sparseft_kernels import _launch

    monkeypatch.setattr(_launch, "_uploads", type(_launch._uploads)())
    monkeypatch.setattr(_launch, "_KEPT_UPLOADS", 4)
    s = scene("adamw", device)
    s.step("triton")
    first = dict(_launch._uploads)
    s.step("triton")
    assert {k: id(v) for k, v in _launch._uploads.items()} == {k: id(v) for k, v in first.items()}
    kept = s.grads[3]
    s.grads[3] = s.grads[3].clone()
    s.step("triton")
    new = [key for key in _launch._uploads if key not in first]
    assert [key[2][0] for key in new] == ["table"]
    assert not kept.isnan().any()
    moved = [kept]  # alive, so that every address is new
    for _ in range(6):
        moved.append(kept.clone())
        s.grads[3] = moved[-1]
        s.step("triton")
    assert len(_launch._uploads) <= _launch._KEPT_UPLOADS
