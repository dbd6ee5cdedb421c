"""Registered with peft like one of its own methods, and taken out without a trace."""

from __future__ import annotations

import copy
import enum
import importlib
import pickle
import subprocess
import sys
import threading

import pytest

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'peft>=0.18,<0.22'")

from peft import PeftType  # noqa: E402

import sparseft.peft as method  # noqa: E402
from sparseft.peft import SparseFtConfig, _shim  # noqa: E402


def picture():
    """All of the enumeration and the tables, in order, as values that compare."""
    inner = {
        name: list(value.items()) if isinstance(value, dict) else list(value)
        for name, value in vars(PeftType).items()
        if isinstance(value, dict | list) and name != "__annotations__"
    }
    tables = [list(table.items()) for table in _shim._tables()]
    return list(PeftType), list(vars(PeftType)), inner, tables


@pytest.fixture
def unregistered():
    method.unregister()
    yield
    method.register()


def test_the_member_is_one_like_the_others():
    kind = PeftType.SPARSEFT
    assert isinstance(kind, PeftType)
    assert isinstance(kind, str)
    assert kind == "SPARSEFT"
    assert (kind.name, kind.value) == ("SPARSEFT", "SPARSEFT")
    assert PeftType("SPARSEFT") is PeftType["SPARSEFT"] is kind
    assert list(PeftType)[-1] is kind
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert kind in PeftType
    assert "SPARSEFT" in list(PeftType)
    assert {kind: 1}[PeftType("SPARSEFT")] == 1
    assert type(kind).__name__ == type(PeftType.LORA).__name__
    assert repr(kind) == repr(PeftType.LORA).replace("LORA", "SPARSEFT")
    assert copy.deepcopy(kind) is copy.copy(kind) is kind


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_keep_its_identity(protocol):
    assert pickle.loads(pickle.dumps(PeftType.SPARSEFT, protocol)) is PeftType.SPARSEFT
    config = SparseFtConfig(target_modules=["q"], density=0.1)
    again = pickle.loads(pickle.dumps(config, protocol))
    assert again == config
    assert again.peft_type is PeftType.SPARSEFT


def test_unregister_leaves_peft_as_it_was_and_register_comes_back():
    with_ours, kind = picture(), PeftType.SPARSEFT
    method.unregister()
    without = picture()
    assert not method.registered()
    assert "SPARSEFT" not in PeftType.__members__
    with pytest.raises(ValueError, match="SPARSEFT"):
        PeftType("SPARSEFT")
    with pytest.raises(AttributeError):
        _ = PeftType.SPARSEFT
    method.unregister()  # a second time: nothing
    assert picture() == without
    method.register()
    assert picture() == with_ours
    assert PeftType.SPARSEFT is kind
    method.register()
    assert picture() == with_ours


@pytest.mark.slow
def test_unregistered_is_peft_as_imported_without_us():
    """Byte for byte: enumeration and tables of a process that never had the method."""
    code = (
        "import peft, peft.mapping, hashlib\n"
        "def look():\n"
        "    m, e = peft.mapping, peft.PeftType\n"
        "    tables = [repr(list(getattr(m, f'PEFT_TYPE_TO_{k}_MAPPING').items())) for k in\n"
        "              ('CONFIG', 'TUNER', 'MIXED_MODEL', 'PREFIX')]\n"
        "    inner = {k: repr(v) for k, v in vars(e).items() if isinstance(v, (dict, list))}\n"
        "    return repr((list(e), sorted(vars(e)), inner, tables))\n"
        "before = look()\n"
        "import sparseft.peft as s\n"
        "assert look() != before and s.registered()\n"
        "s.unregister()\n"
        "assert look() == before, (look(), before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_pickle_of_the_member_alone_registers_the_method_where_it_is_read():
    payload = pickle.dumps(PeftType.SPARSEFT)
    code = (
        f"import pickle; kind = pickle.loads({payload!r})\n"
        "import peft; assert kind is peft.PeftType.SPARSEFT"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_threads_register_it_once(unregistered):
    before, barrier, failures = picture(), threading.Barrier(4), []

    def work():
        try:
            barrier.wait()
            method.register()
            assert SparseFtConfig(nnz=1).peft_type is PeftType.SPARSEFT
        except BaseException as bad:
            failures.append(bad)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(PeftType).count("SPARSEFT") == 1
    method.unregister()
    assert picture() == before


def test_modules_imported_a_second_time_take_over(unregistered):
    """As after a reload: the member stays the same object, the classes are the new ones."""
    method.register()
    with_ours, kind = picture(), PeftType.SPARSEFT
    held = {n: m for n, m in sys.modules.items() if n.startswith("sparseft.peft")}
    try:
        for name in held:
            del sys.modules[name]
        again = importlib.import_module("sparseft.peft")
        assert again is not method
        assert PeftType.SPARSEFT is kind
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] is again.SparseFtConfig
        assert list(PeftType).count("SPARSEFT") == 1
        again.unregister()
    finally:
        sys.modules.update(held)
        importlib.import_module("sparseft").__dict__["peft"] = method
    method.register()
    assert picture() == with_ours


def test_a_config_made_while_unregistered_registers(unregistered):
    assert SparseFtConfig(nnz=3).peft_type is PeftType.SPARSEFT


def test_a_registration_that_fails_leaves_nothing(unregistered):
    before = picture()
    mapping = sys.modules["peft.mapping"].PEFT_TYPE_TO_PREFIX_MAPPING
    mapping["sparseft_"] = "taken"
    try:
        with pytest.raises(KeyError, match="sparseft_"):
            method.register()
        del mapping["sparseft_"]
        assert picture() == before
    finally:
        mapping.pop("sparseft_", None)


def test_a_method_of_that_name_that_is_not_ours_is_refused(unregistered, monkeypatch):
    class Kinds(str, enum.Enum):
        SPARSEFT = "SPARSEFT"

    monkeypatch.setattr(peft, "PeftType", Kinds)
    with pytest.raises(RuntimeError, match="has a method SPARSEFT that is not this one"):
        method.register()


@pytest.mark.parametrize("version", ["0.17.1", "0.22.0", "1.0", "0.22.0.dev0"])
def test_a_peft_outside_the_tested_range_is_refused(version, monkeypatch, unregistered):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError) as caught:
        method.register()
    said = str(caught.value)
    assert f"peft {version} is installed" in said
    assert "pip install 'peft>=0.18,<0.22'" in said
    assert "--to peft-shira" in said
    monkeypatch.undo()


def test_no_peft_is_said_with_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'peft>=0\.18,<0\.22'"):
        _shim.check_version()


@pytest.mark.slow
def test_import_sparseft_imports_no_peft():
    code = (
        "import sys, sparseft, sparseft.io.foreign, sparseft.composition, sparseft.selection\n"
        "sparseft.attach, sparseft.Adapter\n"
        "assert 'peft' not in sys.modules, 'peft was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
