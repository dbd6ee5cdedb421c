"""Denoising against its definition in float64: low-rank part whole, the largest residuals kept."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparseft import Denoise, denoised
from sparseft._integrity import bits_equal
from sparseft.denoise import embedding_names
from sparseft.errors import DecompositionError, OptionError

SHAPES = {
    "a.square": (24, 24),
    "b.tall": (40, 24),
    "b.vector": (24,),
    "c.wide": (24, 40),
    "d.square": (24, 24),
    "e.cube": (3, 4, 5),
    "f.scalar": (),
    "g.empty": (0, 4),
    "h.row": (1, 30),
    "i.wide": (24, 40),
}
RULES = {
    "rank": Denoise(rank=3),
    "energy": Denoise(energy=0.7),
    "median": Denoise(hard="median"),
    "noise": Denoise(hard=0.08),
    "no residual": Denoise(rank=2, residual=0),
    "half": Denoise(rank=5, residual=0.5),
}


def triples(shapes=None, dtype=torch.float32, seed=0):
    """Weights before and after a change of low rank plus noise, of every shape."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = []
    for name, shape in (shapes or SHAPES).items():
        step = 0.1 * draw(*shape)
        if len(shape) == 2:
            step += draw(shape[0], 3) @ draw(3, shape[1]) * 0.3
        old = draw(*shape).to(dtype)
        made.append((name, (old.double() + step).to(dtype), old))
    return made


def wide_difference(theta1, theta0):
    wide = torch.float64 if torch.float64 in (theta1.dtype, theta0.dtype) else torch.float32
    return theta1.to(wide) - theta0.to(wide)


def definition(delta, how):
    """(low-rank part, residual) in float64, by one full SVD."""
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    if how.rank is not None:
        r = how.rank
    elif how.energy is not None:
        share = s.square().cumsum(0) / s.square().sum()
        r = int((share < how.energy).sum()) + 1
    else:
        m, n = sorted(delta.shape)
        beta = m / n
        inside = 8 * beta / (beta + 1 + (beta * beta + 14 * beta + 1) ** 0.5)
        level = (2 * (beta + 1) + inside) ** 0.5
        if how.hard == "median":
            x = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]  # Marchenko-Pastur law
            low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2
            x = low + (high - low) * x
            mass = ((high - x) * (x - low)).sqrt() / x
            middle = x[int((mass.cumsum(0) < mass.sum() / 2).sum())].sqrt()
            limit = level / middle * s.median() if len(s) % 2 else level / middle * (
                s[len(s) // 2 - 1 : len(s) // 2 + 1].mean()
            )  # fmt: skip
        else:
            limit = level * how.hard * n**0.5
        r = int((s > limit).sum())
    low_rank = (u[:, :r] * s[:r]) @ vh[:r]
    return low_rank, delta.double() - low_rank


@pytest.mark.parametrize("rule", RULES)
def test_the_definition(rule):
    how = RULES[rule]
    given = triples()
    found = dict(denoised(given, how))
    assert list(found) == list(SHAPES), "in the order given"
    for name, theta1, theta0 in given:
        delta = wide_difference(theta1, theta0)
        value = found[name]
        assert value.shape == delta.shape
        assert value.dtype == torch.float32
        if theta1.ndim != 2 or not theta1.numel():
            assert bits_equal(value, delta)
            continue
        low, rest = definition(delta, how)
        if name == "h.row" and how.rank is not None:
            assert bits_equal(value, delta), "a row has no more singular values than one"
            continue
        kept = value == delta
        count = round(how.residual * delta.numel())
        assert torch.allclose(value[~kept].double(), low[~kept], atol=2e-5)
        if float(rest.norm()) < 1e-4 * float(delta.norm()):
            continue  # a row under an energy: what is kept is rounding
        assert int(kept.sum()) == count
        if 0 < count < delta.numel():
            assert float(rest[kept].abs().min()) >= float(rest[~kept].abs().max()) - 2e-5


def test_large_matrices_by_block_iteration():
    """Beyond the complete decomposition of small ones; the low-rank part is well separated."""
    shapes = {"a": (150, 300), "b": (300, 150), "c": (150, 300)}
    how = Denoise(rank=3, residual=0.05)
    given = triples(shapes)
    for (name, value), (_, theta1, theta0) in zip(denoised(given, how), given, strict=True):
        delta = theta1 - theta0
        low, _ = definition(delta, how)
        kept = value == delta
        assert int(kept.sum()) == round(0.05 * delta.numel()), name
        assert torch.allclose(value[~kept].double(), low[~kept], atol=2e-2)
        assert float((value[~kept].double() - low[~kept]).norm() / low[~kept].norm()) < 2e-3


@pytest.mark.parametrize(
    "how",
    [
        Denoise(rank=2, residual=1),
        Denoise(rank=40),
        Denoise(energy=1.0),
        Denoise(rank=2, residual=0.9999),
    ],
    ids=["all residual", "full rank", "all energy", "rounds to all"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_nothing_is_left_out_differences_keep_their_bits(how, dtype):
    given = triples(dtype=dtype)
    for (_, value), (_, theta1, theta0) in zip(denoised(given, how), given, strict=True):
        assert bits_equal(value, wide_difference(theta1, theta0))


@pytest.mark.parametrize("memory", ["1GiB", "40kB", 1, 0], ids=str)
def test_the_memory_changes_windows_but_not_results(memory, caplog):
    given = triples()
    wanted = dict(denoised(given, Denoise(rank=3)))
    with caplog.at_level(logging.WARNING, logger="sparseft"):
        found = dict(denoised(given, Denoise(rank=3, memory=memory)))
    assert list(found) == list(wanted)
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], atol=1e-5)
    said = [r.getMessage() for r in caplog.records]
    if memory == "1GiB":
        assert not said
    if memory in (0, 1):
        assert len(said) == 1, "once, though every matrix needs more"
        assert "'a.square' of shape (24, 24) needs" in said[0]
        assert f"memory={memory} leaves" in said[0]


def test_weights_are_read_a_window_at_a_time():
    read = []

    def pairs():
        for triple in triples({str(i): (40, 40) for i in range(12)}):
            read.append(triple[0])
            yield triple

    stream = denoised(pairs(), Denoise(rank=3, memory=2 * 3 * 40 * 40 * 4))
    assert next(stream)[0] == "0"
    assert len(read) == 4, "three fit into half the memory, one was looked at"
    assert [name for name, _ in stream] == [str(i) for i in range(1, 12)]


def test_no_more_than_the_memory_is_held():
    path = Path(__file__).with_name("ops") / "test_memory.py"
    spec = importlib.util.spec_from_file_location("ops_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = triples({f"{i:02}": ((96, 160), (160, 96), (96, 96))[i % 3] for i in range(60)})
    memory = 1_500_000
    peak = module.peak_bytes(
        lambda: [None for _ in denoised(given, Denoise(rank=40, memory=memory))]
    )
    everything = sum(theta1.numel() * 4 for _, theta1, _ in given)
    # pruning has scratch of its own: an eighth of a matrix and what its products need
    assert peak <= memory + 6 * 96 * 160 * 4 < everything


@pytest.mark.parametrize("residual", [0.1, 0.0])
def test_vectors_are_all_residual(residual):
    given = triples({"v": (57,), "w": (3,), "m": (8, 9)})
    found = dict(denoised(given, Denoise(rank=2, residual=residual, vectors="denoise")))
    for name in ("v", "w"):
        [(theta1, theta0)] = [(b, a) for n, b, a in given if n == name]
        delta = theta1 - theta0
        kept = torch.argsort(delta.abs(), descending=True, stable=True)
        kept = kept[: round(residual * delta.numel())]
        wanted = torch.zeros_like(delta)
        wanted[kept] = delta[kept]
        assert torch.equal(found[name], wanted)


def test_embeddings_pass_by_option():
    given = triples({"emb": (40, 24), "lin": (40, 24)})
    for option, untouched in (("pass", True), ("denoise", False)):
        how = Denoise(rank=2, embeddings=option)
        found = dict(denoised(given, how, embeddings={"emb"}))
        assert torch.equal(found["emb"], given[0][1] - given[0][2]) is untouched
        assert not torch.equal(found["lin"], given[1][1] - given[1][2])


def test_embeddings_are_known_by_their_modules():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 6, bias=False)
            self.words = nn.Embedding(6, 4)
            self.bag = nn.EmbeddingBag(6, 4)
            self.other = nn.Linear(4, 6)
            self.head.weight = self.words.weight

    assert embedding_names(Model()) == {"words.weight", "bag.weight"}


def test_the_target_may_be_the_weight():
    given = triples()
    how = Denoise(rank=2, residual=0.2, target="weight")
    alone = dict(denoised([(n, b, None) for n, b, _ in given], how))
    for (name, value), (_, theta1, _) in zip(denoised(given, how), given, strict=True):
        assert torch.equal(value, alone[name])
        if theta1.ndim == 2 and min(theta1.shape) > 2:
            low, _ = definition(theta1, how)
            kept = value == theta1
            assert int(kept.sum()) == round(0.2 * theta1.numel())
            assert torch.allclose(value[~kept].double(), low[~kept], atol=1e-5)
        else:
            assert torch.equal(value, theta1)


def test_what_is_handed_out_is_the_callers():
    given = triples()
    before = [(b.clone(), a.clone()) for _, b, a in given]
    for target in ("delta", "weight"):
        for _, value in denoised(given, Denoise(rank=2, target=target, vectors="denoise")):
            value.zero_()
    for (_, theta1, theta0), (b, a) in zip(given, before, strict=True):
        assert bits_equal(theta1, b)
        assert bits_equal(theta0, a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    how = Denoise(rank=3)
    given = triples(dtype=dtype)
    given[2] = (given[2][0], given[2][1], given[2][2].double())  # one side wider than the other
    for (name, value), (_, theta1, theta0) in zip(denoised(given, how), given, strict=True):
        delta = wide_difference(theta1, theta0)
        assert value.dtype == delta.dtype
        if name == "c.wide":
            low, _ = definition(delta, how)
            kept = value == delta
            assert int(kept.sum()) == round(0.1 * delta.numel())
            assert torch.allclose(value[~kept].double(), low[~kept], atol=2e-5)


def test_strided_weights_that_require_grad():
    given = triples({"a": (40, 24), "b": (24, 40)})
    strided = [(n, b.t().contiguous().t().requires_grad_(), a) for n, b, a in given]
    for (_, one), (_, other) in zip(
        denoised(given, Denoise(rank=3)), denoised(strided, Denoise(rank=3)), strict=True
    ):
        assert torch.equal(one, other)
        assert not other.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["a.square", "b.tall", "b.vector", "e.cube", "h.row"])
@pytest.mark.parametrize("vectors", ["pass", "denoise"])
def test_what_cannot_be_ranked_is_named(name, bad, vectors):
    given = triples()
    [at] = [i for i, triple in enumerate(given) if triple[0] == name]
    given[at][1].view(-1)[-1] = bad
    with pytest.raises(DecompositionError, match=rf"'{name}'.*1 NaN|'{name}'.*1 infinite") as info:
        list(denoised(given, Denoise(rank=3, vectors=vectors)))
    assert "diverge?" in str(info.value)


def test_refused_pairs():
    a, b = torch.randn(4, 6), torch.randn(6, 4)
    how = Denoise(rank=1)
    with pytest.raises(DecompositionError, match=r"theta0 of 'w' has shape \(6, 4\), theta1.*4, 6"):
        list(denoised([("w", a, b)], how))
    with pytest.raises(DecompositionError, match="theta0 of 'w' is None.*target='weight'"):
        list(denoised([("w", a, None)], how))
    with pytest.raises(DecompositionError, match=r"'w' has dtype torch.int64"):
        list(denoised([("w", a, a.long())], how))
    with pytest.raises(DecompositionError, match="'w' comes twice; wanted names of their own"):
        list(denoised([("w", a, a), ("v", a, a), ("w", b, b)], how))
    for wrong, message in (
        ({"w": a}, r"pairs is a dict; wanted triples \(name, theta1, theta0\)"),
        (None, "pairs is a NoneType; wanted triples"),
        ([("v", a, a), ("w", a)], r"pairs\[1\] is a tuple \(2 items\); wanted a triple"),
        ([a], r"pairs\[0\] is a Tensor \(no tuple\)"),
        ([("w", a.numpy(), a)], "theta1 of 'w' is a ndarray; wanted a tensor, torch.as_tensor"),
        ([("w", a, a.numpy())], "theta0 of 'w' is a ndarray"),
    ):
        with pytest.raises(DecompositionError, match=message):
            list(denoised(wrong, how))
    for wrong, message in (
        ({"rank": 1}, r"how is a dict; wanted a Denoise.*Denoise\(\*\*options\)"),
        (Denoise, "how is the class itself; wanted a Denoise"),
        (0.9, "how is a float"),
    ):
        with pytest.raises(OptionError, match=message):
            list(denoised([("w", a, a)], wrong))
    with pytest.raises(OptionError, match="embeddings is the string 'words'; wanted names"):
        list(denoised([("word", a, a)], how, embeddings="words"))
    assert list(denoised([], how)) == []


class TestDenoise:
    def test_json_there_and_back(self):
        for how in (*RULES.values(), Denoise(hard=0.5, target="weight", memory=12, vectors="pass")):
            assert Denoise(**json.loads(json.dumps(dataclasses.asdict(how)))) == how

    def test_numbers_of_numpy(self):
        how = Denoise(rank=np.int64(3), residual=np.float32(0.5), memory=np.int32(9))
        assert how == Denoise(rank=3, residual=0.5, memory=9)
        assert json.loads(json.dumps(dataclasses.asdict(how))) == dataclasses.asdict(how)
        assert Denoise(energy=np.float16(0.5)).energy == Denoise(hard=np.float64(0.5)).hard == 0.5
        with pytest.raises(OptionError, match=r"Denoise: rank is 3\.0; wanted an integer"):
            Denoise(rank=np.float32(3))

    def test_the_defaults_are_the_papers(self):
        how = Denoise(energy=0.9)
        assert (how.target, how.embeddings, how.vectors) == ("delta", "denoise", "pass")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "Denoise: got none of them; wanted exactly one of rank=, energy=, hard=."),
            ({"hard_threshold": 0.1}, "hard_threshold is 0.1; wanted hard=0.1, as what truncated"),
            ({"rank": 2, "energy": 0.9}, "got rank=2, energy=0.9; wanted exactly one"),
            ({"rank": -1}, "rank is -1; wanted an integer >= 0"),
            ({"rank": 2.0}, "rank is 2.0; wanted an integer"),
            ({"energy": 1.5}, r"energy is 1.5; wanted a number in \(0, 1\]"),
            ({"hard": "mean"}, "hard is 'mean'; wanted 'median' or the standard deviation"),
            ({"hard": -0.1}, "Denoise: hard is -0.1"),
            ({"rank": 2, "residual": 1.1}, r"residual is 1.1; wanted .* in \[0, 1\]"),
            ({"rank": 2, "residual": True}, "residual is True"),
            ({"rank": 2, "residual": float("nan")}, "residual is nan"),
            ({"rank": 2, "target": "weights"}, "target is 'weights'.*Did you mean 'weight'"),
            ({"rank": 2, "embeddings": False}, "embeddings is False; wanted one of 'denoise'"),
            ({"rank": 2, "vectors": "no"}, "vectors is 'no'; wanted one of 'pass', 'denoise'"),
            ({"rank": 2, "memory": "much"}, "Denoise: memory: 'much' is no number of bytes"),
        ],
    )
    def test_refusals(self, options, message):
        with pytest.raises(OptionError, match=message):
            Denoise(**options)
