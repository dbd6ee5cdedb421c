"""The composer at work: reports of switches, grids, threads, budgets, learned coefficients."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from torch.func import functional_call

from sparseft import Composer
from sparseft.errors import CompositionError, OptionError, StackOrderError, UnknownNameError
from sparseft.modules import ParameterIndex


class TestReport:
    def test_what_a_switch_moved(self, composer):
        first = composer.switch(["sw", "nli"])
        union = sum(len({*_positions(composer["sw"], n), *_positions(composer["nli"], n)})
                    for n in composer["sw"])  # fmt: skip
        assert (first.written, first.restored, first.reweighted) == (union, 0, False)
        assert first.union_built
        assert first.weight_bytes == 4 * union
        assert first.tensors == len(composer["sw"])
        assert first.seconds > 0
        assert composer.last_switch is first
        again = composer.switch({"sw": 0.5, "nli": 1})
        assert (again.written, again.restored, again.reweighted) == (union, 0, True)
        assert not again.union_built
        other = composer.apply("qu")
        assert other.restored == union
        assert other.written > union
        gone = composer.revert()
        assert (gone.written, gone.restored) == (0, other.written)
        assert gone.active == {}

    def test_as_a_line(self, composer):
        line = str(composer.switch({"sw": 0.5, "nli": 1}))
        assert line.startswith("0.5 * sw + nli: ")
        assert "union built" in line
        assert line.endswith(" ms")
        assert "re-weighted" in str(composer.switch({"sw": 1, "nli": 1}))
        assert str(composer.revert()).startswith("base: ")
        assert composer.last_switch.to_json()["method"] == "linear"

    def test_heads_count(self, model, make_adapter):
        composer = Composer(model, {"a": make_adapter(model, 0, dense=True)})
        head = sum(t.numel() for t in composer["a"].dense.values())
        assert composer.switch("a").written == composer["a"].nnz + head


def _positions(adapter, name):
    return adapter[name].indices.tolist()


class TestGrid:
    def test_every_combination_has_the_bits_of_a_switch(self, composer, model, snapshot, same):
        composer.apply("qu")
        before = snapshot(model)
        seen = []
        for coeffs in composer.grid({"sw": [0.0, 0.5, 1.0], "nli": [1, -1]}):
            assert composer.active == coeffs
            seen.append((coeffs, snapshot(model), composer.last_switch))
        assert [tuple(c.values()) for c, _, _ in seen] == [
            (0, 1), (0, -1), (0.5, 1), (0.5, -1), (1, 1), (1, -1)
        ]  # fmt: skip
        assert composer.active == {"qu": 1.0}
        assert same(snapshot(model), before)
        assert all(report.reweighted for _, _, report in seen[1:])
        assert [report.union_built for _, _, report in seen] == [True] + [False] * 5
        for coeffs, got, _ in seen:
            composer.switch(coeffs)
            assert same(snapshot(model), got)

    def test_leaving_early_puts_back(self, composer, model, snapshot, same):
        base = snapshot(model)
        for coeffs in composer.grid({"sw": [0.5, 1.0, 2.0]}):
            if coeffs["sw"] == 1.0:
                break
        del coeffs
        assert composer.active == {}
        assert same(snapshot(model), base)

        def fails():
            for _ in composer.grid({"sw": torch.tensor([0.5, 1.0])}, method="ties"):
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fails()
        gc.collect()  # the traceback held the generator
        assert same(snapshot(model), base)

    def test_composed_inside(self, composer, model, snapshot, same):
        base = snapshot(model)
        for _ in composer.grid({"sw": [0.5, 1.0]}):
            inner = snapshot(model)
            with composer.composed("qu"):
                pass
            assert same(snapshot(model), inner)
        assert same(snapshot(model), base)

    def test_bad_grids(self, composer):
        with pytest.raises(UnknownNameError, match="no adapter is called 'swa'. Did you mean 'sw'"):
            composer.grid({"swa": [1.0]})
        with pytest.raises(CompositionError, match="no coefficient for 'sw'"):
            composer.grid({"sw": []})
        with pytest.raises(CompositionError, match="coefficient of 'sw' is nan"):
            composer.grid({"sw": [1.0, float("nan")]})
        with pytest.raises(CompositionError, match="grid wants name -> coefficient"):
            composer.grid(["sw"])
        with pytest.raises(UnknownNameError, match="no composition method 'teis'. Did you mean"):
            next(composer.grid({"sw": 1.0}, method="teis"))
        assert composer.active == {}


class TestThreads:
    def test_a_block_is_its_threads_own(self, composer, model, snapshot, same):
        base = snapshot(model)
        wanted = {}
        for name in ("sw", "qu", "nli"):
            with composer.composed(name):
                wanted[name] = snapshot(model)
        wrong, start = [], threading.Barrier(3)

        def serve(name):
            start.wait()
            for _ in range(20):
                with composer.composed(name):
                    if not same(snapshot(model), wanted[name]):
                        wrong.append(name)

        threads = [threading.Thread(target=serve, args=(name,)) for name in wanted]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert wrong == []
        assert composer.active == {}
        assert same(snapshot(model), base)

    def test_switches_from_many_threads(self, composer, model, snapshot, same):
        base = snapshot(model)

        def work(seed):
            for i in range(30):
                composer.switch({"sw": 0.1 * (i % 5), "qu": seed}, method="linear")

        threads = [threading.Thread(target=work, args=(s,)) for s in (1, 2, 3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        composer.revert()
        assert same(snapshot(model), base)

    def test_a_deep_copy_has_a_lock_of_its_own(self, composer):
        twin = copy.deepcopy(composer)
        with composer.composed("sw"):
            done = []
            t = threading.Thread(target=lambda: done.append(twin.switch("qu")))
            t.start()
            t.join(10)
            assert done
        twin.forget()


class TestBudgets:
    def test_mapped_adapters_give_the_same_bits(
        self, model, make_adapter, tmp_path, snapshot, same
    ):
        paths = {}
        for i, name in enumerate(("sw", "qu", "nli")):
            paths[name] = make_adapter(model, i, name=name).save(tmp_path / name)
        found = []
        for budget in (None, 0, "700 B"):
            composer = Composer(model, paths, host_bytes=budget)
            composer.switch({"sw": 1, "qu": 0.5})
            composer.switch({"nli": 1, "qu": 0.5})
            found.append(snapshot(model))
            report = composer.residency()
            assert budget is None or report.host_bytes <= 700
            tiers = {r.name: r.tier for r in report.residents}
            assert budget is None or "mapped" in tiers.values()
            assert budget is not None or set(tiers.values()) == {"host"}
            composer.revert()
        assert same(found[0], found[1])
        assert same(found[0], found[2])

    def test_a_budget_that_is_none(self, model):
        with pytest.raises(OptionError, match="host_bytes"):
            Composer(model, host_bytes="many")

    def test_removed_adapters_leave_nothing(self, composer):
        composer.switch(["sw", "qu"])
        composer.revert()
        composer.remove("sw")
        assert [r.name for r in composer.residency().residents] == ["qu", "nli"] or {
            r.name for r in composer.residency().residents
        } == {"qu", "nli"}
        assert all("sw" not in str(key) for key in composer._planner._plans)


class TestWeights:
    def test_they_are_those_of_a_switch(self, composer, model):
        coeffs = {"sw": 0.5, "nli": -1.25}
        found = composer.weights(coeffs)
        composer.switch(coeffs)
        index = ParameterIndex(model)
        assert set(found) == set(composer["sw"])
        for name, weight in found.items():
            assert torch.equal(weight, index.get(name))

    def test_gradients_of_coefficients(self, composer, model):
        """Against differences of the loss, and against autograd through dense diffs."""
        model.double()
        ids = torch.tensor([[1, 2, 3]])
        coeffs = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)

        def loss(c):
            return (
                functional_call(model, composer.weights({"sw": c[0], "nli": c[1]}), (ids,))
                .square()
                .sum()
            )

        loss(coeffs).backward()
        dense = coeffs.detach().clone().requires_grad_()
        index = ParameterIndex(model)
        weights = {
            n: index.get(n)
            + dense[0] * composer["sw"][n].to_dense().double()
            + dense[1] * composer["nli"][n].to_dense().double()
            for n in composer["sw"]
        }
        functional_call(model, weights, (ids,)).square().sum().backward()
        assert torch.allclose(coeffs.grad, dense.grad, rtol=1e-9)
        assert all(p.grad is not None for p in model.body.parameters())

    def test_a_coefficient_can_be_learned(self, composer, model):
        ids = torch.tensor([[1, 2, 3, 4]])
        with composer.composed({"sw": 0.8, "nli": -0.5}):
            wanted = model(ids).detach()
        coeffs = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.Adam([coeffs], lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            out = functional_call(
                model, composer.weights({"sw": coeffs[0], "nli": coeffs[1]}), (ids,)
            )
            (out - wanted).square().sum().backward()
            optimizer.step()
        assert torch.allclose(coeffs, torch.tensor([0.8, -0.5]), atol=0.05)

    def test_what_has_no_coefficient(self, model, make_adapter, composer):
        composer.switch("sw")
        with pytest.raises(CompositionError, match="sw lie on the model; revert before"):
            composer.weights({"sw": 1.0})
        composer.revert()
        composer.add("set", make_adapter(model, 8, mode="set"))
        with pytest.raises(CompositionError, match="mode 'set'"):
            composer.weights({"set": 1.0})
        composer.add("head", make_adapter(model, 9, dense=True))
        with pytest.raises(CompositionError, match="holds all of 'classifier"):
            composer.weights({"head": 1.0})
        with pytest.raises(UnknownNameError, match="no adapter is called 'x'"):
            composer.weights({"x": 1.0})
        with pytest.raises(CompositionError, match="coefficient of 'sw' is inf"):
            composer.weights({"sw": float("inf")})


def test_blocks_left_out_of_order_by_a_grid(composer):
    points = composer.grid({"sw": [1.0, 2.0]})
    next(points)
    block = composer.composed("qu")
    block.__enter__()
    with pytest.raises(StackOrderError, match="out of order"):
        points.close()
    block.__exit__(None, None, None)
    composer.forget()
