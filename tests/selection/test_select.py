"""What `select` takes and refuses: counts, patterns, bases, files, functions."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparseft import attach, select
from sparseft.errors import (
    MaskError,
    OptionError,
    UnknownNameError,
)
from sparseft.selection import register_selector, select_random
from sparseft.selection.random import _splitmix64

NUMEL = 116


class TestCounts:
    def test_both_or_neither(self, pair):
        base, tuned = pair()
        with pytest.raises(MaskError, match=r"one of the two; got both"):
            select(tuned, nnz=3, density=0.1, base=base)
        with pytest.raises(MaskError, match=r"one of the two; got neither"):
            select(tuned, base=base)

    @pytest.mark.parametrize("nnz", [-1, 2.0, "3", True])
    def test_nnz(self, pair, nnz):
        base, tuned = pair()
        with pytest.raises(MaskError, match="wanted an integer >= 0"):
            select(tuned, nnz=nnz, base=base)

    @pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan"), "0.1", True])
    def test_density(self, pair, density):
        base, tuned = pair()
        with pytest.raises(MaskError, match=r"wanted a fraction in \(0, 1\]"):
            select(tuned, density=density, base=base)

    def test_more_than_there_is(self, pair):
        base, tuned = pair()
        with pytest.raises(MaskError, match=r"nnz=117 entries.*there are 116 candidate"):
            select(tuned, nnz=NUMEL + 1, base=base)

    def test_less_than_one(self, pair):
        base, tuned = pair()
        with pytest.raises(MaskError, match=r"0.001 of 116 candidate entries = 0.*less than one"):
            select(tuned, density=0.001, base=base)

    def test_density_of_what(self, pair):
        base, tuned = pair()
        kept = select(tuned, density=0.1, include="matrix", base=base)
        assert kept.nnz == 3
        kept = select(tuned, density=0.1, density_of="model", include="matrix", base=base)
        assert kept.nnz == 12
        with pytest.raises(MaskError, match="density=0.5 of 116 model entries = 58.*there are 30"):
            select(tuned, density=0.5, density_of="model", include="matrix", base=base)
        with pytest.raises(MaskError, match="density_of='modl'.*Did you mean 'model'"):
            select(tuned, density=0.5, density_of="modl", base=base)

    def test_scope(self, pair):
        base, tuned = pair()
        with pytest.raises(MaskError, match="scope='tensors'.*Did you mean 'tensor'"):
            select(tuned, nnz=3, scope="tensors", base=base)


class TestPatterns:
    def test_include_and_exclude(self, pair):
        base, tuned = pair()
        assert list(select(tuned, nnz=3, include=["m*", "v*"], base=base)) == ["matrix", "vector"]
        left = select(tuned, nnz=3, exclude=["embed*", "scalar"], base=base)
        assert list(left) == ["cube", "empty", "matrix", "strided", "vector"]

    def test_tied_under_either_name(self, pair):
        base, tuned = pair()
        for pattern in ("embed.weight", "head.weight"):
            assert list(select(tuned, nnz=18, include=pattern, base=base)) == ["embed.weight"]

    def test_a_pattern_that_matches_nothing(self, pair):
        base, tuned = pair()
        with pytest.raises(UnknownNameError, match=r"'matrx' matches none.*'matrix'"):
            select(tuned, nnz=3, include=["matrx"], base=base)
        with pytest.raises(UnknownNameError, match="'head' matches none"):
            select(tuned, nnz=3, exclude=["head"], base=base)

    def test_nothing_left(self, pair):
        base, tuned = pair()
        with pytest.raises(MaskError, match="no parameter is left"):
            select(tuned, nnz=3, exclude="*", base=base)
        with pytest.raises(MaskError, match="only floating ones count"):
            select(tuned, nnz=3, include="counts", base=base)


class TestMagnitude:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_largest_changes_in_fp32(self, pair, dtype):
        base, tuned = pair(dtype, ties=False)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        old, new = dict(base.named_parameters()), dict(tuned.named_parameters())
        masks = select(tuned, nnz=30, base=base)
        scores = {n: (new[n].detach().to(wide) - old[n].detach().to(wide)).abs() for n in masks}
        kept = torch.cat([scores[n].reshape(-1)[p.indices.long()] for n, p in masks.items()])
        rest = torch.cat([scores[n][~p.to_mask()] for n, p in masks.items()])
        assert kept.min() >= rest.max()

    def test_bf16_differences_are_not_rounded_to_bf16(self):
        base = nn.ParameterDict({"w": nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.bfloat16))})
        tuned = {"w": torch.tensor([1.0 + 2**-12, 1.0 + 2**-11])}  # equal once rounded to bf16
        assert select(base, nnz=1, base=base, tuned=tuned)["w"].indices.tolist() == [1]

    def test_every_form_of_base(self, pair, tmp_path):
        base, tuned = pair()
        wanted = select(tuned, nnz=37, base=base)
        state = {n: t.clone().contiguous() for n, t in base.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "shards").mkdir()
        names = sorted(state)
        shards = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
        for file, part in shards.items():
            save_file({n: state[n] for n in part}, tmp_path / "shards" / file)
        index = {"weight_map": {n: f for f, part in shards.items() for n in part}}
        (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
        wrapped = {f"module.{n}": t for n, t in state.items()}
        one_name = {n: t for n, t in state.items() if n != "embed.weight"}  # tied: head.weight
        for source in (state, wrapped, one_name, tmp_path, str(tmp_path / "model.safetensors"),
                       tmp_path / "shards"):  # fmt: skip
            assert select(tuned, nnz=37, base=source).equals(wanted), source
        assert select(base, nnz=37, base=base, tuned=tuned).equals(wanted)

    def test_encoder_inside_a_model_with_a_head(self, tmp_path):
        class Model(nn.Module):
            base_model_prefix = "net"

            def __init__(self):
                super().__init__()
                self.net = nn.Linear(4, 4)

        model = Model()
        state = {
            n: p.detach() + torch.eye(4) for n, p in model.net.named_parameters() if p.ndim == 2
        }
        save_file(state, tmp_path / "model.safetensors")  # "weight", as of the bare encoder
        masks = select(model, nnz=4, include="net.weight", base=tmp_path)
        assert masks["net.weight"].indices.tolist() == [0, 5, 10, 15]

    def test_base_that_does_not_fit(self, pair, tmp_path):
        base, tuned = pair()
        state = dict(base.state_dict())
        with pytest.raises(MaskError, match=r"base has no tensor for parameter 'cube'.*exclude"):
            select(tuned, nnz=3, base={n: t for n, t in state.items() if n != "cube"})
        with pytest.raises(MaskError, match=r"\(3, 9\) for 'cube' but the model has \(3, 2, 4\)"):
            select(tuned, nnz=3, base={**state, "cube": torch.zeros(3, 9)})
        with pytest.raises(OptionError, match=r"'magnitude' needs base=\.\.\.; got no option"):
            select(tuned, nnz=3)
        with pytest.raises(OptionError, match=r"'magnitude' needs base=\.\.\.; got only tuned"):
            select(tuned, nnz=3, tuned=base)
        with pytest.raises(UnknownNameError, match="no option 'bse'.*Did you mean 'base'"):
            select(tuned, nnz=3, bse=base)
        with pytest.raises(TypeError, match=r"base\['cube'\] is str, wanted a tensor.*its path"):
            select(tuned, nnz=3, base=dict.fromkeys(state, "x.pt"))
        with pytest.raises(TypeError, match="base is int"):
            select(tuned, nnz=3, base=3)
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            select(tuned, nnz=3, base=tmp_path / "nothing")
        with pytest.raises(FileNotFoundError, match="holds 0 .safetensors files"):
            select(tuned, nnz=3, base=tmp_path)
        (tmp_path / "x.safetensors").write_bytes(b"not safetensors at all")
        with pytest.raises(MaskError, match=r"x.safetensors is no safetensors file"):
            select(tuned, nnz=3, base=tmp_path / "x.safetensors")

    def test_base_written_by_torch_save(self, pair, tmp_path):
        """Not opened by its path; the message has the call that gives its tensors."""
        base, tuned = pair()
        path = tmp_path / "pytorch_model.bin"
        torch.save(base.state_dict(), path)
        for source in (path, tmp_path):
            with pytest.raises((MaskError, FileNotFoundError), match="base.*torch.save") as caught:
                select(tuned, nnz=3, base=source)
            assert f"base=torch.load({str(path)!r}, weights_only=True)" in str(caught.value)
        wanted = select(tuned, nnz=3, base=base)
        assert select(tuned, nnz=3, base=torch.load(path, weights_only=True)).equals(wanted)
        inside = {"step": 3, "model": base.state_dict()}
        with pytest.raises(MaskError, match=r"base\['model'\] is a mapping itself: give that"):
            select(tuned, nnz=3, base=inside)

    @pytest.mark.parametrize("scope", ["global", "tensor", "row"])
    def test_nan_is_named(self, pair, scope):
        base, tuned = pair()
        with torch.no_grad():
            tuned.matrix[2, 1] = float("nan")
        with pytest.raises(MaskError, match=r"'matrix' are NaN \(first at flat index 13\)"):
            select(tuned, nnz=40, base=base, scope=scope)

    def test_infinite_changes_rank_first(self, pair):
        base, tuned = pair()
        with torch.no_grad():
            tuned.vector[3] = float("inf")
        assert select(tuned, nnz=1, base=base)["vector"].indices.tolist() == [3]

    @pytest.mark.parametrize(
        ("scope", "fix"),
        [("global", "nnz=9 or fewer"), ("tensor", "scope='global'"), ("row", "scope='global'")],
    )
    def test_fewer_moved_than_asked_for(self, scope, fix, caplog):
        """The count stays exact; both numbers are said."""
        base = {"a": torch.zeros(4, 3), "b": torch.zeros(4)}
        tuned = {"a": torch.zeros(4, 3), "b": torch.ones(4)}
        tuned["a"][0, :] = 1.0
        tuned["a"][1, :2] = 1.0  # 5 of a's 12 entries moved, in 2 of its rows, and all 4 of b's
        model = nn.ParameterDict({n: nn.Parameter(t) for n, t in tuned.items()})
        with caplog.at_level(logging.WARNING):
            assert select(model, nnz=9, scope=scope, base=base).nnz == 9
            assert not caplog.records or scope != "global"
            caplog.clear()
            nnz = 11 if scope == "global" else 8  # a's share of 8 is 6, b's is 2
            masks = select(model, nnz=nnz, scope=scope, base=base)
        assert masks.nnz == nnz
        unmoved = sum(int((p.to_mask() & (tuned[n] == 0)).sum()) for n, p in masks.items())
        [said] = [r.getMessage() for r in caplog.records]
        assert f"{nnz} entries were asked for" in said
        assert f"only {nnz - unmoved} with a score above 0" in said
        assert f"the other {unmoved} kept did not move" in said
        assert fix in said

    @pytest.mark.parametrize("scope", ["global", "tensor", "row"])
    def test_nothing_moved_at_all(self, scope, pair, caplog):
        """Then the base is in doubt, not the count."""
        _, tuned = pair(ties=False)
        with caplog.at_level(logging.WARNING):
            assert select(tuned, nnz=40, scope=scope, base=copy.deepcopy(tuned)).nnz == 40
        [said] = [r.getMessage() for r in caplog.records]
        assert "finds only 0 with a score above 0" in said
        assert "Is base the model as it was before training" in said
        assert "nnz=0" not in said

    def test_no_warning_while_enough_moved(self, pair, caplog):
        base, tuned = pair(ties=False)
        with caplog.at_level(logging.WARNING):
            for scope in ("global", "tensor", "row"):
                select(tuned, nnz=40, scope=scope, base=base)
            select(tuned, nnz=0, base=copy.deepcopy(tuned))
            select(tuned, "random", nnz=NUMEL)
        assert not caplog.records

    def test_nothing_moved(self, pair):
        """As few entries as asked for, though all scores are 0 (a threshold would keep all)."""
        base, _ = pair()
        masks = select(base, nnz=10, base=copy.deepcopy(base))
        assert masks.nnz == 10
        assert masks["cube"].indices.tolist() == list(range(10))

    def test_base_that_is_the_tuned_model(self):
        """``model.state_dict()`` gives views, which training moves along."""
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        for base in (model, model.state_dict()):
            with pytest.raises(MaskError, match="state_dict\\(\\) makes no copies"):
                select(model, nnz=3, base=base)
        some = {n: t if "0." in n else t.clone() for n, t in model.state_dict().items()}
        assert select(model, nnz=3, base=some).nnz == 3

    def test_on_an_attached_model(self, pair):
        """Candidates are the model's weights, not the compact leaves on it."""
        base, tuned = pair()
        wanted = select(tuned, nnz=20, base=base)
        sparse = attach(tuned, {"matrix": torch.ones(5, 6, dtype=torch.bool)})
        assert select(tuned, nnz=20, base=base).equals(wanted)
        sparse.detach()


class TestRandom:
    def test_pinned(self):
        """These numbers are the same on every machine, for ever; a change is a Numerics entry."""
        model = nn.ParameterDict({n: nn.Parameter(torch.zeros(1000)) for n in "ab"})
        masks = select(model, "random", nnz=8, seed=3)
        assert {n: p.indices.tolist() for n, p in masks.items()} == {
            "a": [89, 196, 285, 395, 482],
            "b": [70, 312, 871],
        }

    def test_generator_is_splitmix64(self):
        """First outputs of the published reference implementation for state 0."""
        import numpy as np

        got = [int(v) for v in _splitmix64(np.uint64(0), 0, 3)]
        assert got == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]

    def test_seeds_and_names_differ(self):
        model = nn.ParameterDict({n: nn.Parameter(torch.zeros(500)) for n in "ab"})
        one = select(model, "random", nnz=500, seed=0, scope="tensor")
        other = select(model, "random", nnz=500, seed=1, scope="tensor")
        assert not one.equals(other)
        assert one["a"].indices.tolist() != one["b"].indices.tolist()

    def test_a_tensors_mask_depends_on_its_name_only(self):
        small = nn.ParameterDict({"a": nn.Parameter(torch.zeros(40, 25))})
        large = nn.ParameterDict(
            {n: nn.Parameter(torch.zeros(25, 40, dtype=torch.bfloat16)) for n in "zab"}
        )
        one = select(small, "random", density=0.1, scope="tensor")["a"].indices
        other = select(large, "random", density=0.1, scope="tensor")["a"].indices
        assert torch.equal(one, other)

    def test_uniform(self):
        """Every entry is kept equally often: chi-square over 100 cells, 2,000 seeds."""
        model = nn.ParameterDict(
            {"a": nn.Parameter(torch.zeros(60)), "b": nn.Parameter(torch.zeros(40))}
        )
        hits = torch.zeros(100)
        runs, nnz = 2000, 30
        for seed in range(runs):
            masks = select(model, "random", nnz=nnz, seed=seed)
            hits += torch.cat([masks["a"].to_mask(), masks["b"].to_mask()])
        p = nnz / 100
        # Close to chi-square with 99 degrees of freedom.
        statistic = float(((hits - runs * p) ** 2 / (runs * p * (1 - p))).sum())
        assert 60 < statistic < 150  # mean 100, deviation about 14


class TestFunction:
    def test_scores(self, pair):
        _, tuned = pair()
        masks = select(
            tuned, "function", nnz=5, fn=lambda n, p: (n == "vector") * torch.ones_like(p)
        )
        assert masks["vector"].indices.tolist() == [0, 1, 2, 3, 4]

    def test_masks_say_the_count(self, pair):
        _, tuned = pair()
        masks = select(tuned, "function", fn=lambda n, p: p > 0)
        for name, pattern in masks.items():
            assert torch.equal(pattern.to_mask(), dict(tuned.named_parameters())[name] > 0)
        fewer = select(tuned, "function", nnz=2, fn=lambda n, p: p > 0)
        assert fewer.nnz == 2

    def test_refusals(self, pair):
        _, tuned = pair()
        with pytest.raises(OptionError, match=r"'function' needs fn="):
            select(tuned, "function", nnz=2)
        with pytest.raises(MaskError, match=r"'cube' has scores.*nnz=... or density=..."):
            select(tuned, "function", fn=lambda n, p: p.abs())
        with pytest.raises(MaskError, match=r"returned \(24,\), wanted .*\(3, 2, 4\)"):
            select(tuned, "function", nnz=2, fn=lambda n, p: p.reshape(-1))
        with pytest.raises(MaskError, match="returned torch.int64"):
            select(tuned, "function", nnz=2, fn=lambda n, p: torch.ones(p.shape).long())
        with pytest.raises(MaskError, match=r"'cube' hold negative values"):
            select(tuned, "function", nnz=2, fn=lambda n, p: p.detach() - 100)
        with pytest.raises(MaskError, match="fn changed parameter 'cube'"):
            select(tuned, "function", nnz=2, fn=lambda n, p: p.mul_(2).abs())
        with pytest.raises(UnknownNameError, match="no option 'path'; it has fn"):
            select(tuned, "function", nnz=2, fn=lambda n, p: p.abs(), path="x")


class TestMethodThatIsNoName:
    def test_a_function_is_told_its_place(self, pair):
        _, tuned = pair()

        def size(name, parameter):
            return parameter.abs()

        with pytest.raises(TypeError, match=r"method is function, wanted a name.*'random'") as bad:
            select(tuned, size, nnz=5)
        assert "select(model, 'function', fn=size, nnz=...)" in str(bad.value)
        assert "size(name, parameter) returns a tensor" in str(bad.value)
        assert select(tuned, "function", fn=size, nnz=5).nnz == 5
        with pytest.raises(TypeError, match=r"fn=fn, nnz"):
            select(tuned, lambda name, parameter: parameter.abs(), nnz=5)

    def test_a_registered_function_is_told_its_name(self, pair):
        with pytest.raises(TypeError, match=r"function of 'random', wanted .* method='random'"):
            select(pair()[1], select_random, nnz=5)

    def test_a_base_in_its_place(self, pair):
        base, tuned = pair()
        for wrong, kind in ((base, "Odd"), (dict(base.state_dict()), "dict")):
            with pytest.raises(TypeError, match=f"method is {kind}, .* base=\\.\\.\\."):
                select(tuned, wrong, nnz=5)

    def test_a_kind_that_does_not_exist(self):
        with pytest.raises(OptionError, match="kind='score'.*Did you mean 'scores'"):
            register_selector("x", reference="https://example.org", kind="score")


def test_masks_summary(pair):
    base, tuned = pair()
    masks = select(tuned, nnz=29, base=base)
    rows = masks.summary()
    assert [r.name for r in rows] == list(masks)
    assert sum(r.nnz for r in rows) == masks.nnz == 29
    assert masks.numel == NUMEL
    assert masks.density == 29 / NUMEL
    assert (rows[2].name, rows[2].shape, rows[2].nnz, rows[2].density) == ("empty", (0, 3), 0, 0.0)


def test_whole_path_to_attach(pair):
    base, tuned = pair()
    model = copy.deepcopy(base)
    masks = select(tuned, nnz=20, base=base)
    with attach(model, masks) as sparse:
        assert sparse.nnz == 20
