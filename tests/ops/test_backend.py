"""Which backend runs: order of choice, refusals that say why, one log line."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

import sparseft
from sparseft import ops
from sparseft.errors import BackendError
from sparseft.ops import _backend


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("SPARSEFT_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield
    _backend._missing_package.cache_clear()


def test_auto_on_cpu_is_the_reference():
    assert ops.resolve_backend("gather_entries", torch.zeros(1)) == "reference"


def test_argument_beats_context_beats_environment(monkeypatch):
    assert ops.current_backend() == "auto"
    monkeypatch.setenv("SPARSEFT_BACKEND", "triton")
    assert ops.current_backend() == "triton"
    with ops.backend("reference"):
        assert ops.current_backend() == "reference"
        with ops.backend("auto"):
            assert ops.current_backend() == "auto"
        assert ops.resolve_backend("gather_entries", torch.zeros(1)) == "reference"
        with pytest.raises(BackendError, match="lie on cpu"):
            ops.resolve_backend("gather_entries", torch.zeros(1), backend="triton")
    with pytest.raises(BackendError, match="lie on cpu"):
        ops.gather_entries(torch.zeros(3), torch.tensor([1]))
    ops.gather_entries(torch.zeros(3), torch.tensor([1]), backend="reference")


def test_the_block_ends_after_an_error():
    with pytest.raises(ZeroDivisionError), ops.backend("reference"):
        raise ZeroDivisionError
    assert ops.current_backend() == "auto"


def test_other_threads_see_the_block():
    seen = []
    with sparseft.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(ops.current_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def in_an_argument(monkeypatch):
    ops.resolve_backend("gather_entries", torch.zeros(1), backend="trition")


def in_a_block(monkeypatch):
    with ops.backend("trition"):
        raise AssertionError("the block was entered")


def in_the_environment(monkeypatch):
    monkeypatch.setenv("SPARSEFT_BACKEND", "trition")
    ops.current_backend()


@pytest.mark.parametrize("use", [in_an_argument, in_a_block, in_the_environment])
def test_unknown_name_lists_the_known_and_the_nearest(use, monkeypatch):
    with pytest.raises(BackendError, match=r"'auto', 'reference', 'triton'.*Did you mean 'triton'"):
        use(monkeypatch)


def test_triton_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="an_op_of_tomorrow has no Triton kernel"):
        ops.resolve_backend("an_op_of_tomorrow", torch.zeros(1), backend="triton")
    with pytest.raises(BackendError, match="not contiguous"):
        ops.resolve_backend("gather_entries", torch.zeros(2, 3).t(), backend="triton")
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    _backend._missing_package.cache_clear()
    with pytest.raises(BackendError, match="'triton' is not installed"):
        ops.resolve_backend("gather_entries", torch.zeros(1), backend="triton")


def test_auto_logs_its_reason_once(monkeypatch, caplog):
    monkeypatch.setattr(_backend, "_logged", set())

    class OnGpu:
        device = torch.device("cuda")

    with caplog.at_level(logging.WARNING, logger="sparseft.backend"):
        for _ in range(3):
            assert ops.resolve_backend("an_op_of_tomorrow", OnGpu()) == "reference"
    assert [r.message for r in caplog.records] == [
        r for r in (caplog.records[0].message,) if "no Triton kernel" in r
    ]
