"""What moving masks refuse in several processes; tests/distributed runs them in some."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sparseft import attach
from sparseft.errors import AttachError
from sparseft.modules import repattern
from sparseft.training import Reselection, reselection

_spec = importlib.util.spec_from_file_location("_moving", Path(__file__).with_name("_moving.py"))
kit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kit)


def test_what_several_processes_cannot_do_is_named(monkeypatch):
    student, _, _, start = kit.teacher_and_student()
    sparse = attach(student, start)
    monkeypatch.setattr(reselection, "processes", lambda group=None: 2)
    with pytest.raises(AttachError, match=r"scope='global' .* 2 processes .* scope='tensor'"):
        Reselection(sparse, steps=10, scope="global")
    monkeypatch.setattr(repattern, "processes", lambda group: 2)
    more = ~start["layer.weight"]
    with pytest.raises(AttachError, match=r"'layer.weight': 80 entries cannot become 688"):
        sparse.reselect_({"layer.weight": more}, optimizer=None)
