"""Sums of gradients against a dense autograd loop, in every way a weight can be used."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparseft import SparsePattern, attach
from sparseft.errors import AttachError, MaskError, UnknownNameError
from sparseft.modules import ParameterIndex, _gradient_tiles
from sparseft.modules.gradient_scores import GradientScores

_spec = importlib.util.spec_from_file_location(
    "_accuracy", Path(__file__).parent.parent / "_accuracy.py"
)
_accuracy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_accuracy)


class Scaled(nn.Linear):
    """A subclass with its own forward around the stock one."""

    def forward(self, x):
        return 3 * super().forward(x.tanh())


class Every(nn.Module):
    """A tied head, a layer used twice, a subclass, Conv1D, and weights read around their layer."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(11, 6, padding_idx=3)
        self.kind = nn.Embedding(4, 6, scale_grad_by_freq=True)
        self.twice = nn.Linear(6, 6)
        self.scaled = Scaled(6, 9)
        self.conv1d = Conv1D(6, 9)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.around = nn.Linear(6, 6, bias=False)
        self.raw = nn.Parameter(torch.randn(6, 6).t())
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 2)
        self.mode = "plain"

    def body(self, x):
        x = F.relu_(self.twice(x))
        return self.twice(x) + self.conv1d(self.scaled(x))

    def forward(self, ids):
        x = self.embed(ids) + self.kind(ids % 4)
        x = self.norm(x + self.conv(x.unsqueeze(1)).sum(1))
        if self.mode == "plain":
            x = self.body(x)
        else:
            x = checkpoint(self.body, x, use_reentrant=self.mode == "reentrant")
        x = self.around(x) + x @ self.around.weight.t() @ self.raw
        return self.head(x)


NAMES = [n for n in ParameterIndex(Every()).names if not n.startswith("unused")]


def build(dtype=torch.float32):
    torch.manual_seed(0)
    return Every().to(dtype)


BATCHES = [
    torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(i)) for i in range(3)
]


def loss_of(model, ids):
    logits = model(ids).float() if model.raw.dtype != torch.float64 else model(ids)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def dense(model, square, batches=BATCHES):
    """The definition: whole gradients of every batch."""
    index = ParameterIndex(model)
    sums = {n: torch.zeros(index.get(n).shape, dtype=torch.float64) for n in NAMES}
    sums = {
        n: s.to(torch.promote_types(index.get(n).dtype, torch.float32)) for n, s in sums.items()
    }
    for ids in batches:
        grads = torch.autograd.grad(loss_of(model, ids), [index.get(n) for n in NAMES])
        for name, grad in zip(NAMES, grads, strict=True):
            wide = grad.to(sums[name].dtype)
            sums[name] += wide.square() if square else wide
    return {n: s.reshape(-1) for n, s in sums.items()}


def streamed(model, batches=BATCHES, names=NAMES, **options):
    with GradientScores(model, names, **options) as scores:
        for ids in batches:
            loss_of(model, ids).backward()
            scores.step()
    assert scores.batches == len(batches)
    return scores.finish()


def close(found, model, square, names=NAMES):
    stock, exact = dense(model, square), dense(copy.deepcopy(model).double(), square)
    as_accurate(found, stock, exact, names)


def as_accurate(found, stock, exact, names=NAMES):
    """Apply the rule to all tensors together: a few entries of one are a matter of luck."""
    parts = ([], [], [])
    for name in names:
        indices, scores = (t.cpu() for t in found[name])
        at, scale = indices.long(), exact[name].square().mean().sqrt()
        for part, values in zip(parts, (scores, stock[name][at], exact[name][at]), strict=True):
            part.append(values / scale.to(values.dtype))
    _accuracy.assert_as_accurate(*(torch.cat(part) for part in parts))


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of 20 entries, so that every matrix has several."""
    monkeypatch.setattr(_gradient_tiles, "TILE", 20)


@pytest.mark.parametrize("square", [False, True], ids=["sum", "square"])
@pytest.mark.parametrize("mode", ["plain", "checkpoint", "reentrant"])
def test_all_entries(square, mode, tiny_tiles):
    model = build()
    model.mode = mode
    several = mode == "reentrant" and square  # `twice` in it is seen only when backward gets there
    found = streamed(model, statistic="square" if square else "sum", accumulate=several)
    assert list(found) == NAMES
    for name, (indices, scores) in found.items():
        assert torch.equal(indices, torch.arange(scores.numel(), dtype=torch.int32)), name
    model.mode = "plain"
    close(found, model, square)


@pytest.mark.parametrize("square", [False, True], ids=["sum", "square"])
@pytest.mark.parametrize("attached", ["plain", "training", "frozen"])
def test_candidates_are_the_best_of_the_first_batch(square, attached, tiny_tiles):
    model = build()
    reference = copy.deepcopy(model)
    sparse = None
    if attached != "plain":
        mask = {n: torch.rand(ParameterIndex(model).get(n).shape) < 0.3 for n in NAMES}
        sparse = attach(model, mask)
        for leaf in sparse.leaves.values():
            leaf.requires_grad_(attached == "training")
    counts = {n: 4 + i for i, n in enumerate(NAMES)}
    statistic = "square" if square else "sum"
    found = streamed(model, statistic=statistic, candidates=counts)
    first = dense(reference, square, BATCHES[:1])
    for name in NAMES:
        indices, scores = found[name]
        wanted = min(counts[name], first[name].numel())
        assert indices.numel() == wanted == scores.numel()
        assert bool((indices.diff() > 0).all())
        rest = torch.ones_like(first[name], dtype=torch.bool)
        rest[indices.long()] = False
        if bool(rest.any()):
            best, worst = first[name][rest].abs().max(), first[name][~rest].abs().min()
            assert worst >= best * (1 - 1e-5), name
    close(found, reference, square)
    if attached == "training":  # the leaves got the gradients of training as ever
        for name, masked in sparse._masked.items():
            exact = dense(reference, False)[name][masked.indices.long()]
            assert torch.allclose(masked.leaf.grad, exact, rtol=1e-4, atol=1e-6), name
    elif attached == "frozen":
        assert all(leaf.grad is None for leaf in sparse.leaves.values())


def test_given_candidates_and_ties():
    model = build()
    fixed = {n: SparsePattern.from_mask(torch.rand(ParameterIndex(model).get(n).shape) < 0.4)
             for n in NAMES}  # fmt: skip
    found = streamed(model, statistic="square", candidates=fixed)
    for name in NAMES:
        assert torch.equal(found[name][0], fixed[name].indices)
    close(found, model, True)
    # Rows of tokens that did not occur are zero: the first of them fill up, in flat order.
    ids = torch.tensor([[9, 9, 10]])
    flat = nn.Embedding(12, 2)
    with GradientScores(flat, ["weight"], candidates={"weight": 7}) as scores:
        flat(ids).sum().backward()
        scores.step()
    assert scores.finish()["weight"][0].tolist() == [0, 1, 2, 18, 19, 20, 21]


@pytest.mark.parametrize("square", [False, True], ids=["sum", "square"])
def test_excluded_entries_are_never_candidates(square, tiny_tiles):
    model = build()
    torch.manual_seed(1)
    barred = {
        n: SparsePattern.from_mask(torch.rand(ParameterIndex(model).get(n).shape) < 0.5)
        for n in NAMES
    }
    statistic = "square" if square else "sum"
    first = dense(model, square, BATCHES[:1])
    for count in (3, 10**6):
        found = streamed(
            model, statistic=statistic, candidates=dict.fromkeys(NAMES, count), exclude=barred
        )
        for name in NAMES:
            allowed = ~barred[name].to_mask().reshape(-1)
            got = found[name][0].long()
            assert bool(allowed[got].all()), name
            assert got.numel() == min(count, int(allowed.sum()))
            left = allowed.clone()
            left[got] = False
            if bool(left.any()) and got.numel():
                best, worst = first[name][left].abs().max(), first[name][got].abs().min()
                assert worst >= best * (1 - 1e-5), name
        close(found, model, square)
    everything = streamed(model, statistic=statistic, exclude=barred)
    for name in NAMES:
        assert torch.equal(everything[name][0], found[name][0])


def test_weighted_candidates():
    model = build()
    counts = dict.fromkeys(NAMES, 8)
    found = streamed(model, candidates=counts, weighted=True, batches=BATCHES[:1])
    index, first = ParameterIndex(model), dense(model, False, BATCHES[:1])
    for name in NAMES:
        product = (first[name] * index.get(name).detach().reshape(-1)).abs()
        got = product[found[name][0].long()]
        best = product.topk(got.numel()).values
        assert torch.allclose(got.sort(descending=True).values, best, rtol=1e-4, atol=1e-9), name


@pytest.mark.parametrize("square", [False, True], ids=["sum", "square"])
def test_several_backwards_make_one_batch(square):
    model = build()
    statistic = "square" if square else "sum"
    halves = [(ids[:1], ids[1:]) for ids in BATCHES]

    def total(model, ids):
        return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum")

    for candidates in (None, dict.fromkeys(NAMES, 10**6)):
        with GradientScores(
            model, NAMES, statistic=statistic, candidates=candidates, accumulate=True
        ) as scores:
            for parts in halves:
                for ids in parts:
                    total(model, ids).backward()
                scores.step()
        found = scores.finish()
        weights = [ParameterIndex(model).get(n) for n in NAMES]
        exact = [torch.zeros_like(w) for w in weights]
        for parts in halves:
            both = [torch.autograd.grad(total(model, ids), weights) for ids in parts]
            for sums, first, second in zip(exact, *both, strict=True):
                sums += (first + second).square() if square else first + second
        for name, sums in zip(NAMES, exact, strict=True):
            assert torch.allclose(found[name][1], sums.reshape(-1), rtol=1e-4, atol=1e-5), name
    if square:
        with GradientScores(model, NAMES, statistic="square") as scores:
            total(model, BATCHES[0]).backward()
            with pytest.raises(MaskError, match=r"squared already.*accumulate=True"):
                total(model, BATCHES[1]).backward()


@pytest.mark.parametrize("square", [False, True], ids=["sum", "square"])
def test_autocast(square):
    model = build()

    def run(model, ids):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, ids)

    with GradientScores(model, NAMES, statistic="square" if square else "sum") as scores:
        for ids in BATCHES:
            run(model, ids).backward()
            scores.step()
    found = scores.finish()
    index = ParameterIndex(model)
    stock = {n: torch.zeros(index.get(n).numel()) for n in NAMES}
    for ids in BATCHES:
        grads = torch.autograd.grad(run(model, ids), [index.get(n) for n in NAMES])
        for name, grad in zip(NAMES, grads, strict=True):
            stock[name] += grad.reshape(-1).square() if square else grad.reshape(-1)
    exact = dense(copy.deepcopy(model).double(), square)
    as_accurate(found, stock, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    model = build(dtype)
    found = streamed(model, statistic="square", candidates=dict.fromkeys(NAMES, 20))
    stock, exact = dense(model, True), dense(copy.deepcopy(model).double(), True)
    for indices, scores in found.values():
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert indices.dtype == torch.int32
    if dtype == torch.float64:
        for name, (indices, scores) in found.items():
            torch.testing.assert_close(scores, exact[name][indices.long()])
    else:
        as_accurate(found, stock, exact)


def test_compiled_modules_run_eagerly():
    model = build()
    found = streamed(model, statistic="square", candidates=dict.fromkeys(NAMES, 9))
    compiled = torch.compile(model, backend="eager")
    torch._dynamo.reset()
    loss_of(compiled, BATCHES[0])
    with GradientScores(
        compiled, NAMES, statistic="square", candidates=dict.fromkeys(NAMES, 9)
    ) as s:
        for ids in BATCHES:
            loss_of(compiled, ids).backward()
            s.step()
    for name, (indices, scores) in s.finish().items():
        assert torch.equal(indices, found[name][0])
        assert torch.equal(scores, found[name][1])


def state(model):
    return {
        n: (p, p._version, p.requires_grad, p.grad, p.detach().clone())
        for n, p in model.named_parameters()
    }


def unchanged(model, before, classes):
    assert [type(m) for m in model.modules()] == classes
    for name, parameter in model.named_parameters():
        old, version, requires_grad, grad, value = before[name]
        assert parameter is old
        assert (parameter._version, parameter.requires_grad) == (version, requires_grad)
        assert parameter.grad is grad or "diff_" in name, name
        assert torch.equal(parameter, value)
        assert not parameter._post_accumulate_grad_hooks


@pytest.mark.parametrize("attached", [False, True])
def test_everything_is_put_back(attached):
    model = build()
    if attached:
        attach(model, {n: torch.rand(ParameterIndex(model).get(n).shape) < 0.3 for n in NAMES})
    else:
        model.twice.weight.requires_grad_(False)
        model.norm.weight.grad = torch.ones(6)
    before, classes = state(model), [type(m) for m in model.modules()]
    with GradientScores(model, NAMES) as scores:
        if not attached:
            loss_of(model, BATCHES[0]).backward()
            scores.step()
            assert all(p.grad is None for n, p in model.named_parameters() if "unused" not in n)
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
    unchanged(model, before, classes)
    for copied in (twin, again):
        assert [m.__class__ for m in copied.modules()] == classes

    class Stop(Exception):
        pass

    def fail(grad):
        raise Stop

    def interrupted():
        with GradientScores(model, NAMES):
            x = model.embed(BATCHES[0])
            x.register_hook(fail)
            model.head(x).sum().backward()

    with pytest.raises(Stop):
        interrupted()
    unchanged(model, before, classes)


def test_misuse_is_named():
    model = build()
    with pytest.raises(UnknownNameError, match="no parameter 'hed.weight'"):
        GradientScores(model, ["hed.weight"])
    with pytest.raises(MaskError, match=r"statistic='squares'.*Did you mean 'square'"):
        GradientScores(model, NAMES, statistic="squares")
    with pytest.raises(MaskError, match="nothing for 'twice.bias'"):
        GradientScores(model, ["twice.bias"], candidates={})
    with pytest.raises(MaskError, match=r"candidates of 'twice.bias' is -1"):
        GradientScores(model, ["twice.bias"], candidates={"twice.bias": -1})
    wrong = SparsePattern.from_mask(torch.ones(3, dtype=torch.bool))
    with pytest.raises(MaskError, match=r"shape \(3,\); the weight has \(6,\)"):
        GradientScores(model, ["twice.bias"], candidates={"twice.bias": wrong})
    with (
        pytest.raises(RuntimeError, match="in use already"),
        GradientScores(model, NAMES) as scores,
    ):
        scores.__enter__()
    with GradientScores(model, ["head.weight"]) as scores:  # a tied name means the weight
        loss_of(model, BATCHES[0]).backward()
        with pytest.raises(RuntimeError, match="after the last step"):
            scores.finish()
        scores.step()
        assert list(scores.finish()) == ["embed.weight"]
    with pytest.raises(RuntimeError, match="taken already"):
        scores.finish()
    with pytest.raises(AttachError, match="inside a GradientScores block"):
        with GradientScores(model, ["twice.weight"]):
            attach(model, {"twice.weight": torch.ones(6, 6, dtype=torch.bool)})


def test_weights_without_a_gradient_are_named():
    model = build()
    names = [*NAMES, "unused.weight"]
    for candidates, size in ((None, 6), (dict.fromkeys(names, 2), 0)):
        with GradientScores(model, names, candidates=candidates) as scores:
            loss_of(model, BATCHES[0]).backward()
            scores.step()
        indices, values = scores.finish()["unused.weight"]
        assert indices.numel() == values.numel() == size
        assert scores.unreached == ["unused.weight"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_gradients_that_are_not_finite_are_named(bad, caplog):
    model = nn.Linear(4, 4)
    with GradientScores(model, ["weight"], candidates={"weight": 3}):
        with pytest.raises(MaskError, match="gradient of 'weight' is NaN or infinite.* fp32 or bf"):
            (model(torch.rand(2, 4)) * torch.tensor([bad, 1, 1, 1])).sum().backward()
    names, skip = ["weight", "bias"], {"nonfinite": "skip"}
    with GradientScores(model, names, candidates=dict.fromkeys(names, 3), **skip) as scores:
        for factor in (torch.tensor([bad, 1, 1, 1]), 1):
            (model(torch.randn(2, 4)) * factor).sum().backward()
            scores.step()
    assert [values.numel() for _, values in scores.finish().values()] == [0, 0]
    assert "'weight' is NaN or infinite in the first batch: it has no candidates" in caplog.text
    with pytest.raises(MaskError, match="nonfinite='skp' is not one of raise, skip.*'skip'"):
        GradientScores(model, names, nonfinite="skp")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("square", [False, True], ids=["sum", "square"])
def test_on_the_gpu(dtype, square):
    model = build(dtype)
    statistic = "square" if square else "sum"
    stock, exact = dense(model, square), dense(copy.deepcopy(model).double(), square)
    model.cuda()
    batches = [ids.cuda() for ids in BATCHES]
    for counts in (None, dict.fromkeys(NAMES, 12)):
        found = streamed(model, batches, statistic=statistic, candidates=counts)
        as_accurate(found, stock, exact)
