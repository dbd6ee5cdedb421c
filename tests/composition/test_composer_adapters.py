"""Which adapters a composer has and with which coefficients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparseft import Composer
from sparseft.errors import AdapterFormatError, CompositionError, UnknownNameError


class TestAdapters:
    def test_objects_files_and_folders(self, make_model, make_adapter, snapshot, same, tmp_path):
        model, other = make_model(), make_model()
        adapters = {n: make_adapter(model, i) for i, n in enumerate("abc")}
        sources = {
            "a": adapters["a"],
            "b": adapters["b"].save(tmp_path / "b.safetensors"),
            "c": str(adapters["c"].save(tmp_path / "c").parent),
        }
        Composer(model, adapters).apply(list("abc"))
        composer = Composer(other, sources)
        composer.apply(list("abc"))
        assert same(snapshot(model), snapshot(other))
        assert composer.names() == list("abc")

    def test_a_name_is_taken_once(self, composer, model, make_adapter):
        with pytest.raises(CompositionError, match=r"'sw' is here already.*remove\('sw'\)"):
            composer.add("sw", make_adapter(model, 7))
        composer.remove("sw")
        composer.add("sw", make_adapter(model, 7))
        composer.apply("sw")
        with pytest.raises(CompositionError, match="'sw' is active"):
            composer.remove("sw")

    def test_readding_a_name_forgets_the_old_union(self, composer, model, make_adapter, snapshot):
        composer.switch(["sw", "qu"])
        composer.revert()
        composer.remove("sw")
        composer.add("sw", make_adapter(model, 9))
        composer.switch(["sw", "qu"])
        got = snapshot(model)
        composer.revert()
        fresh = Composer(model, {"sw": make_adapter(model, 9), "qu": composer["qu"]})
        fresh.switch(["sw", "qu"])
        assert all(torch.equal(b, got[n]) for n, b in snapshot(model).items())

    def test_missing_file(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match="no adapter at"):
            Composer(model, {"a": tmp_path / "nothing"})

    def test_damaged_file_is_found_before_the_model_is_touched(
        self, model, make_adapter, snapshot, same, tmp_path
    ):
        path = make_adapter(model, 0).save(tmp_path / "a.safetensors")
        data = bytearray(path.read_bytes())
        data[-3] ^= 0xFF
        path.write_bytes(data)
        base = snapshot(model)
        composer = Composer(model, {"a": path})
        with pytest.raises(AdapterFormatError):
            composer.apply("a")
        assert same(snapshot(model), base)
        assert composer.active == {}

    def test_unknown_names_and_the_nearest(self, composer):
        with pytest.raises(UnknownNameError, match=r"'swa'.*Did you mean 'sw'"):
            composer.apply("swa")
        with pytest.raises(UnknownNameError, match="no composition method 'linaer'.*'linear'"):
            composer.apply("sw", method="linaer")
        with pytest.raises(UnknownNameError, match="'linear' has no option 'density'; it has none"):
            composer.apply("sw", density=0.5)
        with pytest.raises(UnknownNameError, match="None has been added"):
            Composer(nn.Linear(2, 2)).apply("sw")


class TestCoefficients:
    @pytest.mark.parametrize(
        ("which", "coeffs", "active"),
        [
            ("sw", None, {"sw": 1.0}),
            (["sw", "qu"], None, {"sw": 1.0, "qu": 1.0}),
            (["sw", "qu"], 0.5, {"sw": 0.5, "qu": 0.5}),
            (["sw", "qu"], [2, -1], {"sw": 2.0, "qu": -1.0}),
            (("sw", "qu"), {"qu": 3, "sw": 0}, {"sw": 0.0, "qu": 3.0}),
            ({"sw": np.float32(0.5)}, None, {"sw": 0.5}),
            ({"sw": torch.tensor(0.25)}, None, {"sw": 0.25}),
            ([], None, {}),
        ],
    )
    def test_forms(self, composer, which, coeffs, active):
        composer.switch(which, coeffs)
        assert composer.active == active

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39, "1", None, True, 1j])
    def test_only_finite_numbers(self, composer, snapshot, same, bad):
        base = snapshot(composer.model)
        with pytest.raises(CompositionError, match="coefficient of 'qu'"):
            composer.apply({"sw": 1.0, "qu": bad})
        assert same(snapshot(composer.model), base)

    def test_wrong_count(self, composer):
        with pytest.raises(CompositionError, match="3 coefficients were given for 2 adapters"):
            composer.apply(["sw", "qu"], [1, 2, 3])
        with pytest.raises(CompositionError, match="name each adapter once"):
            composer.apply(["sw", "qu"], {"sw": 1})
        with pytest.raises(CompositionError, match="given twice"):
            composer.apply({"sw": 1}, [1])
        with pytest.raises(CompositionError, match="'sw' is named 2 times"):
            composer.apply(["sw", "qu", "sw"])

    @pytest.mark.parametrize(("dtype", "coeff"), [(torch.float32, 3e38), (torch.float16, 1e5)])
    def test_overflow_is_refused_and_leaves_the_model(
        self, make_model, make_adapter, snapshot, same, dtype, coeff
    ):
        model = make_model(dtype)
        composer = Composer(
            model, {n: make_adapter(model, i, scale=3.0) for i, n in enumerate("ab")}
        )
        composer.apply("a")
        before = snapshot(model)
        with pytest.raises(CompositionError, match=f"overflows {dtype}"):
            composer.switch({"a": coeff, "b": coeff})
        assert same(snapshot(model), before)
        assert composer.active == {"a": 1.0}
