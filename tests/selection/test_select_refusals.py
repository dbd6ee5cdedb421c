"""What `select` refuses, by name and with the way out, and numbers of every kind that it takes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from sparseft import select
from sparseft.errors import MaskError, OptionError, UnknownNameError


@pytest.mark.parametrize(
    ("method", "options"),
    [("weight_magnitude", {}), ("random", {}), ("rows", {"score": "random"}), ("low_rank", {})],
)
def test_a_base_that_would_not_be_looked_at(method, options, pair):
    base, tuned = pair()
    with pytest.raises(UnknownNameError, match=r"tuned=.*select\(tuned, \.\.\.\), or .*magnitude"):
        select(base, method, nnz=5, tuned=tuned, **options)
    with pytest.raises(UnknownNameError, match=rf"base=.*'{method}'.* no option 'base'.*magnitude"):
        select(tuned, method, nnz=5, base=base, **options)
    assert select(base, method, nnz=5, seed=3, **options).nnz == 5


def test_a_scope_that_would_do_nothing(pair, tmp_path):
    _, tuned = pair()
    masks = select(tuned, "n:m", score="weight_magnitude")
    path = masks.save(tmp_path / "m.safetensors")
    for scope in ("row", "tensor"):
        for method, options in (
            ("n:m", {"score": "weight_magnitude"}),
            ("file", {"path": path}),
            ("function", {"fn": lambda name, p: p > 0}),
        ):
            with pytest.raises(MaskError, match=f"scope='{scope}'.*'{method}'.*Leave scope out"):
                select(tuned, method, scope=scope, **options)
    # Scores and a number: here the scope does what it says.
    scored = select(tuned, "function", nnz=20, scope="row", fn=lambda name, p: p.abs())
    assert scored.equals(select(tuned, "weight_magnitude", nnz=20, scope="row"))


def test_only_global_masks_of_several_sizes_nest():
    """The docstring's "may shrink by one": three tensors of 6, 6 and 2, the shares of 3 and 4."""
    model = nn.ParameterList([nn.Parameter(torch.rand(n)) for n in (6, 6, 2)])
    three, four = select(model, "random", nnz=[3, 4], scope="tensor")
    assert ([p.nnz for p in three.values()], [p.nnz for p in four.values()]) == (
        [1, 1, 1],
        [2, 2, 0],
    )
    small, large = select(model, "random", nnz=[3, 4])
    for name, pattern in small.items():
        assert bool((large[name].to_mask() | ~pattern.to_mask()).all())


@pytest.mark.parametrize(
    ("typo", "meant"), [("denisty", "density"), ("exlude", "exclude"), ("sope", "scope")]
)
def test_misspelt_arguments(typo, meant, pair):
    _, tuned = pair()
    for method in ("weight_magnitude", "random", "rows", "n:m"):
        with pytest.raises(UnknownNameError, match=f"no option '{typo}'.*Did you mean .*'{meant}'"):
            select(tuned, method, **{typo: 0.1})


def test_what_is_no_model(pair):
    base, _ = pair()
    with pytest.raises(TypeError, match=r"model is OrderedDict, wanted an nn.Module.*load_state"):
        select(base.state_dict(), "random", nnz=3)
    with pytest.raises(TypeError, match=r"model is type, wanted an nn.Module.*Linear\(\.\.\.\)"):
        select(nn.Linear, "random", nnz=3)


def test_parameters_without_values_or_arithmetic():
    with pytest.raises(MaskError, match="'weight' is on the meta device.*Load the weights"):
        select(nn.Linear(3, 3, bias=False, device="meta"), "weight_magnitude", nnz=2)
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn))
    with pytest.raises(MaskError, match=r"'weight' is torch.float8_e4m3fn.*exclude=\['weight'"):
        select(layer, "weight_magnitude", nnz=2)
    assert select(layer, "weight_magnitude", nnz=2, exclude=["weight"]).nnz == 2


@pytest.mark.parametrize("seed", ["abc", 1.7, None, True])
def test_seeds_that_are_no_integers(seed, pair):
    with pytest.raises(OptionError, match=f"seed is {seed!r}, wanted an integer"):
        select(pair()[1], "random", nnz=3, seed=seed)


def test_numbers_of_every_kind(pair):
    _, tuned = pair()

    def of(method="random", **options):
        return select(tuned, method, **options)

    for half in (np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2)):
        assert of(density=half).equals(of(density=0.5))
    assert of(nnz=np.int64(3), seed=np.int32(7)).equals(of(nnz=3, seed=7))
    given = {"score": "weight_magnitude"}
    assert of("n:m", n=np.int64(1), m=np.int8(3), **given).equals(of("n:m", n=1, m=3, **given))
    sides = {"block": np.array([2, 3]).tolist(), "nnz": 12, **given}
    of_numpy = {**sides, "block": (np.int64(2), np.int16(3))}
    assert of("blocks", **of_numpy).equals(of("blocks", **sides))
    assert of("tiles", fraction=np.float32(0.5), nnz=9, **given).nnz == 9
    for wrong in (np.bool_(True), np.float32(1.5), np.float32("nan")):
        with pytest.raises(MaskError, match="density is .*wanted a fraction"):
            of(density=wrong)
    with pytest.raises(MaskError, match="nnz is .*wanted an integer"):
        of(nnz=np.int64(-1))
    with pytest.raises(OptionError, match="wanted integers with 1 <= n <= m"):
        of("n:m", n=np.float32(1), **given)
