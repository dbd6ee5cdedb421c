"""The composer among autocast, inference mode, event loops, changing files and odd models."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest
import torch
from torch import nn

from sparseft import Adapter, Composer, SparseDiff
from sparseft.errors import CompositionError, OptionError, UnknownNameError


def linear_and_adapter(value=1.0, n=4):
    layer = nn.Linear(n, 1, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    diff = SparseDiff.from_dense(torch.full((1, n), value))
    return layer, Adapter({"weight": diff}, name="one")


class TestModes:
    def test_a_switch_inside_one_autocast_region(self):
        layer, adapter = linear_and_adapter()
        composer, x = Composer(layer, {"one": adapter}), torch.ones(1, 4)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).item() == 0  # autocast keeps its cast of the weight
            with composer.composed("one"):
                assert layer(x).item() == 4
            assert layer(x).item() == 0
            assert [layer(x).item() for _ in composer.grid({"one": [0.5, 2.0]})] == [2, 8]

    def test_inference_mode_and_back(self, composer, model, snapshot, same):
        base = snapshot(model)
        with torch.inference_mode():
            composer.switch(["sw", "nli"])
            inside = snapshot(model)
            composer.switch({"sw": 0.5, "nli": 1})
        composer.switch(["sw", "nli"])
        assert same(snapshot(model), inside)
        composer.revert()
        assert same(snapshot(model), base)
        composer.switch("qu")
        with torch.inference_mode():
            composer.revert()
        assert same(snapshot(model), base)
        model(torch.tensor([[1, 2]])).sum().backward()  # and it can be trained

    def test_detach_inside_one_autocast_region(self):
        from sparseft import attach

        layer, adapter = linear_and_adapter(n=2)
        x = torch.ones(1, 2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).item() == 0
            attached = attach(layer, {"weight": torch.ones(1, 2, dtype=torch.bool)})
            attached.parameters().__next__().fill_(3.0)
            attached.sync_()
            attached.detach(restore=False)
            assert layer(x).item() == 6


class TestFiles:
    @pytest.mark.parametrize("budget", [0, None], ids=["streamed", "in memory"])
    @pytest.mark.parametrize("harm", ["truncate", "zeros"])
    def test_a_file_that_changes_after_use(
        self, harm, budget, model, make_adapter, tmp_path, snapshot, same
    ):
        """What puts the base back never reads the file: cut short, it would be a SIGBUS."""
        path = make_adapter(model, 0, name="sw").save(tmp_path / "sw")
        base = snapshot(model)
        composer = Composer(model, {"sw": path}, host_bytes=budget)
        composer.switch("sw")
        size = os.path.getsize(path)
        if harm == "truncate":
            os.truncate(path, 4096)
        else:
            with open(path, "r+b") as file:
                file.seek(size // 2)
                file.write(bytes(size - size // 2))
        composer.switch({"sw": 0.5})
        composer.revert()
        assert same(snapshot(model), base)

    def test_an_adapter_changed_in_place_while_active(self, model, make_adapter, snapshot, same):
        adapter = make_adapter(model, 0)
        base = snapshot(model)
        composer = Composer(model, {"a": adapter})
        composer.switch("a")
        adapter["body.0.weight"].indices[0] = 47
        composer.revert()
        assert same(snapshot(model), base)

    def test_values_that_became_nan(self, model, make_adapter):
        adapter = make_adapter(model, 0)
        composer = Composer(model, {"a": adapter})
        composer.switch("a")
        adapter["body.0.weight"].values[0] = float("nan")
        composer.revert()
        twin = Composer(model, {"a": adapter})
        with pytest.raises(CompositionError, match=r"'body.0.weight' holds values that are not"):
            twin.switch("a")


class TestTurns:
    def test_two_tasks_of_one_thread(self, composer, model, snapshot, same):
        base = snapshot(model)

        async def work():
            inside = asyncio.Event()

            async def first():
                with composer.composed("sw"):
                    before = snapshot(model)
                    inside.set()
                    await asyncio.sleep(0.01)
                    assert same(snapshot(model), before)

            async def second():
                await inside.wait()
                with pytest.raises(CompositionError, match="another asyncio task"):
                    composer.switch("qu")

            await asyncio.gather(first(), second())
            composer.switch("qu")  # free again

        asyncio.run(work())
        composer.revert()
        composer.remove("sw")
        assert same(snapshot(model), base)

    def test_an_event_loop_inside_a_block(self, composer):
        async def work():
            composer.switch({"sw": 0.5})

        with composer.composed("sw"):
            asyncio.run(work())
        assert composer.active == {}

    def test_a_block_left_in_another_thread(self, composer, model, snapshot, same):
        base = snapshot(model)
        block = composer.composed("sw")
        block.__enter__()
        thread = threading.Thread(target=block.__exit__, args=(None, None, None))
        thread.start()
        thread.join(10)
        assert same(snapshot(model), base)
        done = []
        other = threading.Thread(target=lambda: done.append(composer.switch("qu")))
        other.start()
        other.join(10)
        assert done


class TestOddModels:
    def test_expanded_parameters_are_refused_before_anything(self):
        model = nn.Module()
        model.a = nn.Parameter(torch.zeros(4))
        model.w = nn.Parameter(torch.ones(1).expand(4))
        diff = SparseDiff.from_dense(torch.arange(4.0))
        composer = Composer(model, {"x": Adapter({"a": diff, "w": diff})})
        with pytest.raises(CompositionError, match="'w' share memory"):
            composer.switch("x")
        assert torch.equal(model.a, torch.zeros(4))
        composer.revert()

    def test_two_parameters_on_one_memory(self):
        model = nn.Module()
        model.a = nn.Linear(2, 2)
        model.b = nn.Linear(2, 2)
        model.b.weight = nn.Parameter(model.a.weight.data)
        diff = SparseDiff.from_dense(torch.ones(2, 2))
        composer = Composer(model, {"x": Adapter({"a.weight": diff, "b.weight": diff})})
        with pytest.raises(CompositionError, match=r"'a.weight' and 'b.weight' are two parameters"):
            composer.switch("x")
        flat = torch.zeros(8)
        model.a.weight = nn.Parameter(flat[:4].view(2, 2))
        model.b.weight = nn.Parameter(flat[4:].view(2, 2))
        apart = Composer(model, {"x": Adapter({"a.weight": diff, "b.weight": diff})})
        apart.switch("x")  # neighbours in one storage are two weights
        assert flat.tolist() == [1.0] * 8
        apart.revert()
        assert flat.tolist() == [0.0] * 8

    def test_every_step_back_is_taken(self, composer, model, snapshot, same, monkeypatch, caplog):
        import sparseft.composition.writer as writer

        base = snapshot(model)
        real, calls = writer.TensorWriter.write, []

        def breaks(self, composition):
            calls.append(self)
            if len(calls) == 4:
                raise RuntimeError("broken")
            return real(self, composition)

        def cannot(self):
            if self is calls[1]:
                raise OSError("no way back")
            return restore(self)

        restore = writer.TensorWriter.restore
        monkeypatch.setattr(writer.TensorWriter, "write", breaks)
        monkeypatch.setattr(writer.TensorWriter, "restore", cannot)
        with pytest.raises(RuntimeError, match="broken"):
            composer.switch("sw")
        assert "a step of going back failed" in caplog.text
        now = snapshot(model)
        lost = [n for n in base if not torch.equal(now[n], base[n])]
        assert lost in ([calls[1].names[0]], [])
        monkeypatch.undo()
        calls[1].restore()
        assert same(snapshot(model), base)

    def test_heads_that_overflow(self, model, snapshot, same):
        model.half()
        head = torch.full((3, 6), 1e30)
        adapter = Adapter({}, dense={"classifier.weight": head}, name="head")
        base = snapshot(model)
        with pytest.raises(CompositionError, match="which 'h' holds whole, overflows"):
            Composer(model, {"h": adapter}).switch("h")
        assert same(snapshot(model), base)

    def test_clashes_are_looked_for_in_the_dtype_of_the_day(self, model, make_adapter):
        at = torch.tensor([0], dtype=torch.int32)
        shape = model.body[0].weight.shape
        adapters = {
            n: Adapter({"body.0.weight": SparseDiff(at, torch.tensor([v]), shape, "set")}, name=n)
            for n, v in (("a", 1.0), ("b", 1.0001))
        }
        composer = Composer(model, adapters)
        with pytest.raises(CompositionError, match="both replace entry 0"):
            composer.switch(["a", "b"])
        model.bfloat16()
        composer.switch(["a", "b"])  # equal by now
        composer.revert()
        model.float()
        with pytest.raises(CompositionError, match="both replace entry 0"):
            composer.switch(["a", "b"])


class TestArguments:
    @pytest.mark.parametrize("which", [None, 5, 1.5])
    def test_what_names_nothing(self, composer, which):
        with pytest.raises(CompositionError, match="wanted a name, several, or"):
            composer.switch(which)

    def test_a_set_has_no_order(self, composer):
        with pytest.raises(CompositionError, match="named by a set, which has no order"):
            composer.switch({"sw", "qu"}, [1, 2])
        composer.switch({"sw", "qu"}, 0.5)
        assert composer.active == {"sw": 0.5, "qu": 0.5}

    def test_coefficients_of_no_kind(self, composer):
        for coeffs in ("0.5", object()):
            with pytest.raises(CompositionError, match="wanted a number, one per adapter"):
                composer.switch("sw", coeffs)

    def test_a_method_that_is_no_name(self, composer):
        with pytest.raises(UnknownNameError, match="wanted the name of one"):
            composer.switch("sw", method=["ties"])
        with pytest.raises(UnknownNameError, match="no composition method 'tis'"):
            composer.grid({"sw": 1.0}, method="tis")

    def test_nothing_is_a_revert(self, composer):
        composer.switch("sw")
        report = composer.switch([])
        assert composer.active == {}
        assert not report.union_built
        with pytest.raises(UnknownNameError, match="no composition method"):
            composer.switch([], method="tis")

    def test_adapters_of_no_kind(self, model, make_adapter):
        adapter = make_adapter(model, 0)
        for given in (adapter, [adapter], "sw"):
            with pytest.raises(CompositionError, match="wanted name -> adapter"):
                Composer(model, given)
        with pytest.raises(CompositionError, match="adapter 'z' is int, wanted an Adapter"):
            Composer(model).add("z", 3)
        for cache in (0, -1, "x"):
            with pytest.raises(OptionError, match="plan_cache is"):
                Composer(model, plan_cache=cache)
