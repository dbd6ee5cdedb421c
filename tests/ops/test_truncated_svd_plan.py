"""The planner: every matrix once, in its orientation, within the memory."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseft import ops
from sparseft.errors import DecompositionError, OptionError


def _peak_bytes():
    path = Path(__file__).with_name("test_memory.py")
    spec = importlib.util.spec_from_file_location("ops_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.peak_bytes


def encoder(layers=3, h=48):
    shapes = {}
    for i in range(layers):
        shapes |= {f"{i}.{x}": (h, h) for x in ("query", "key", "value")}
        shapes |= {f"{i}.up": (4 * h, h), f"{i}.down": (h, 4 * h)}
    return shapes


class TestPlan:
    def test_an_encoder(self):
        plan = ops.plan_svd(encoder(), rank=8)
        assert [c.shape for c in plan.chunks] == [(48, 48), (48, 192)]
        assert plan.chunks[1].names == ("0.up", "0.down", "1.up", "1.down", "2.up", "2.down")
        assert plan.chunks[1].tall == (True, False) * 3
        assert plan.bytes == max(c.bytes for c in plan.chunks)

    @given(
        shapes=st.lists(
            st.tuples(st.sampled_from([0, 1, 40, 300]), st.sampled_from([1, 40, 300])), max_size=30
        ),
        memory=st.integers(20_000_000, 60_000_000),
        rule=st.sampled_from([{"rank": 8}, {"energy": 0.9}, {"hard_threshold": "median"}]),
    )
    @settings(max_examples=60, deadline=None)
    def test_every_matrix_once_within_the_memory(self, shapes, memory, rule):
        named = {str(i): s for i, s in enumerate(shapes)}
        plan = ops.plan_svd(named, memory=memory, **rule)
        seen = [n for c in plan.chunks for n in c.names]
        assert sorted(seen) == sorted(named)
        by_shape = {}
        for chunk in plan.chunks:
            assert chunk.bytes <= memory
            assert chunk.names
            for name, tall in zip(chunk.names, chunk.tall, strict=True):
                assert (named[name][::-1] if tall else named[name]) == chunk.shape
            by_shape.setdefault(chunk.shape, []).append(len(chunk.names))
        for sizes in by_shape.values():
            assert max(sizes) - min(sizes) <= 1

    def test_less_memory_more_chunks(self):
        shapes = {str(i): (300, 300) for i in range(24)}
        counts = [
            len(ops.plan_svd(shapes, rank=16, memory=m).chunks)
            for m in ("1GiB", "20MiB", 6_000_000)
        ]
        assert counts[0] == 1 < counts[1] < counts[2]

    def test_refusals(self):
        with pytest.raises(DecompositionError, match=r"'bias' has shape \(5,\); wanted a matrix"):
            ops.plan_svd({"bias": (5,)}, rank=1)
        with pytest.raises(DecompositionError, match=r"'big' of shape \(300, 400\).*by itself"):
            ops.plan_svd({"small": (3, 3), "big": (400, 300)}, rank=1, memory="1MB")
        with pytest.raises(OptionError, match="memory: '1 lot' is no number of bytes"):
            ops.plan_svd({"a": (3, 3)}, rank=1, memory="1 lot")
        with pytest.raises(OptionError, match="wanted exactly one of"):
            ops.plan_svd({"a": (3, 3)})
        for options, message in (
            ({"method": "blok"}, "plan_svd: method is 'blok'.*Did you mean 'block'"),
            ({"dtype": torch.int32}, "dtype is torch.int32; wanted torch.float64, float32"),
            ({"dtype": "float32"}, "dtype is 'float32'; wanted torch.float64"),
            ({"oversample": "x"}, "plan_svd: oversample is 'x'; wanted an integer"),
            ({"seed": -1}, "plan_svd: seed is -1"),
        ):
            with pytest.raises(OptionError, match=message):
                ops.plan_svd({"a": (300, 300)}, rank=1, **options)
        with pytest.raises(DecompositionError, match=r"'w' is a Tensor; wanted shapes, such as"):
            ops.plan_svd({"w": torch.ones(3, 4)}, rank=1)
        with pytest.raises(DecompositionError, match=r"'w' has shape \(2\.5, 4\); wanted two int"):
            ops.plan_svd({"w": (2.5, 4)}, rank=1)
        assert ops.plan_svd({}, rank=1).chunks == ()
        assert ops.plan_svd({}, rank=1).bytes == 0


class TestRun:
    @pytest.mark.parametrize("rule", [{"rank": 8}, {"energy": 0.6}], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_as_one_by_one(self, rule, dtype):
        data = {n: torch.randn(s).to(dtype) for n, s in encoder().items()}
        plan = ops.plan_svd(encoder(), memory="1.5MB", dtype=dtype, **rule)
        assert len(plan.chunks) > 2
        found = dict(plan.run(data.__getitem__))
        assert found.keys() == data.keys()
        for name, got in found.items():
            alone = ops.truncated_svd(data[name][None], **rule)
            assert got.U.shape == alone.U.shape
            assert torch.equal(got.ranks, alone.ranks)
            assert torch.allclose(got.U, alone.U, atol=1e-5)
            assert torch.allclose(got.Vh, alone.Vh, atol=1e-5)
            assert torch.allclose(got.reconstruct(), alone.reconstruct(), atol=1e-4)
            assert torch.allclose(got.residual, alone.residual)

    def test_names_and_shapes_in_errors(self):
        data = {"up": torch.randn(8, 4), "down": torch.randn(4, 8)}
        plan = ops.plan_svd({n: x.shape for n, x in data.items()}, rank=2)
        with pytest.raises(DecompositionError, match=r"'down' has shape \(2, 2\) but was planned"):
            list(plan.run(lambda n: data[n] if n == "up" else torch.ones(2, 2)))
        data["down"][0, 0] = float("nan")
        with pytest.raises(DecompositionError, match=r"matrix 1 \('down'\).*1 NaN"):
            list(plan.run(data.__getitem__))

    def test_matrices_are_asked_for_once_and_chunk_by_chunk(self):
        asked = []

        def load(name):
            asked.append(name)
            return torch.randn(encoder()[name], requires_grad=True)

        steps = ops.plan_svd(encoder(), rank=4).run(load)
        name, found = next(steps)
        assert (name, len(asked)) == ("0.query", 9)
        assert not found.U.requires_grad
        list(steps)
        assert sorted(asked) == sorted(encoder())

    def test_buffers_are_filled_in_place_and_handed_out(self):
        data = {n: torch.randn(s) for n, s in encoder().items()}
        plan = ops.plan_svd(encoder(), rank=8)
        asked = []

        def fill(name, out):
            asked.append(name)
            assert out.shape == encoder()[name]
            out.copy_(data[name])

        seen = []
        for chunk, buffer, found in plan.run_chunks(fill, device="cpu"):
            assert asked == seen + list(chunk.names)
            alone = ops.truncated_svd(buffer, rank=8)
            assert torch.equal(found.S, alone.S)
            assert found.U.shape == (len(buffer), chunk.shape[0], 8)
            for name, tall, own in zip(chunk.names, chunk.tall, buffer, strict=True):
                assert torch.equal(own.mT if tall else own, data[name])
            buffer.zero_()  # the caller's
            seen += chunk.names
        assert sorted(seen) == sorted(data)

    def test_large_chunks_are_cut_on_a_cpu(self, monkeypatch):
        module = importlib.import_module("sparseft.ops.svd_plan")
        monkeypatch.setattr(module, "_CPU_BYTES", 3 * 48 * 48 * 4)
        data = {n: torch.randn(s) for n, s in encoder().items()}
        plan = ops.plan_svd(encoder(), rank=8)
        assert len(plan.chunks) == 2
        fill = {n: lambda out, n=n: out.copy_(data[n]) for n in data}
        sizes = [len(b) for _, b, _ in plan.run_chunks(lambda n, o: fill[n](o), device="cpu")]
        assert sizes == [3, 3, 3] + [1] * 6, "a matrix larger than that is alone"
        monkeypatch.undo()
        whole = dict(plan.run(data.__getitem__))
        monkeypatch.setattr(module, "_CPU_BYTES", 1)
        for name, found in plan.run(data.__getitem__):
            assert torch.allclose(found.reconstruct(), whole[name].reconstruct(), atol=1e-5)

    def test_oversized_matrices_may_go_alone(self):
        shapes = {"a": (40, 40), "b": (300, 400), "c": (40, 40), "d": (400, 300)}
        plan = ops.plan_svd(shapes, rank=4, memory="1MB", oversized="alone")
        assert [c.names for c in plan.chunks] == [("a", "c"), ("b",), ("d",)]
        assert plan.chunks[0].bytes <= 1_000_000 < plan.chunks[1].bytes == plan.bytes
        with pytest.raises(OptionError, match="oversized is 'skip'; wanted 'refuse' or 'alone'"):
            ops.plan_svd(shapes, rank=4, oversized="skip")


CASES = {
    "block": ((300, 500), {"rank": 24}),
    "block, tall": ((500, 300), {"rank": 40}),
    "block grown": ((400, 420), {"energy": 0.9}),
    "gram": ((300, 500), {"rank": 200}),
    "gram, all": ((200, 300), {"energy": 1.0}),
    "median": ((300, 300), {"hard_threshold": "median"}),
    "noise": ((400, 400), {"hard_threshold": 0.1}),
    "svd": ((60, 400), {"rank": 8}),
    "svd by name": ((150, 300), {"rank": 8, "method": "svd"}),
}


@pytest.mark.parametrize("kind", ["normal", "mixed"])
@pytest.mark.parametrize("case", CASES)
def test_the_memory_is_an_upper_bound(case, kind):
    shape, options = CASES[case]
    data = [torch.randn(shape) for _ in range(4)]
    steep = torch.logspace(0, -8, shape[1])
    if kind == "mixed":  # QR for some, a further orthonormalisation, both ways in one chunk
        data[:2] = [x * steep for x in data[:2]]
        data[2] = data[2][:, :3] @ torch.randn(3, shape[1])
    plan = ops.plan_svd({str(i): shape for i in range(4)}, **options)
    assert len(plan.chunks) == 1
    peak = _peak_bytes()(lambda: [None for _ in plan.run(lambda n: data[int(n)])])
    assert peak <= plan.bytes
    if kind == "normal":
        assert plan.bytes < 6 * peak, "a bound so loose would waste the device"
