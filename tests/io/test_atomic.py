"""Files are written whole or not at all, whatever goes wrong in between."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparseft.adapter import Adapter
from sparseft.diff import SparseDiff
from sparseft.io import atomic_write, atomic_write_json, atomic_write_text

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX limits, signals or modes")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")
    return path


def only(path: Path, content: bytes) -> bool:
    """The file has this content and there is nothing else in its folder."""
    return path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_writes_and_replaces(old: Path):
    with atomic_write(old) as file:
        file.write(b"new")
        file.seek(0)
        assert file.read() == b"new"
        assert old.read_bytes() == b"old"  # nothing is seen before the block ends
    assert only(old, b"new")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_error_inside_leaves_the_old_file(old: Path, error: type[BaseException]):
    def write() -> None:
        with atomic_write(old) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert only(old, b"old")


LIMIT = 1 << 16


@contextlib.contextmanager
def limited_file_size() -> Iterator[None]:
    """A real limit of the kernel: writes past `LIMIT` fail, as on a full disk.

    Around the writing call alone: pytest's own output may go to a longer file.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@posix
def test_a_failing_write_leaves_the_old_adapter(tmp_path: Path):
    small = Adapter({"w": SparseDiff.from_dense(torch.ones(4))})
    file = small.save(tmp_path)
    before = file.read_bytes()
    large = Adapter({"w": SparseDiff.from_dense(torch.ones(LIMIT))})
    with limited_file_size(), pytest.raises(OSError) as caught:  # noqa: PT011  (checked below)
        large.save(tmp_path)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(file)
    assert only(file, before)
    assert Adapter.load(tmp_path).equals(small)


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_disk_full_at_any_call(old: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            atomic_write_text(old, "new")
    assert only(old, b"old")


@posix
def test_a_failing_torch_save_is_an_error_of_the_disk(old: Path):
    """Torch's writer turns it into a RuntimeError about a line of its own source."""
    large = {"w": torch.ones(LIMIT)}
    with limited_file_size(), pytest.raises(OSError, match="too large") as caught:  # noqa: PT012
        with atomic_write(old) as file:
            torch.save(large, file)
            file.write(b"never reached")
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(old)
    assert only(old, b"old")


def test_errors_of_the_system_name_the_file_that_was_asked_for(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(number: int, name: str | None = None) -> OSError:
        with pytest.raises(OSError) as caught, atomic_write(old):  # noqa: PT011
            raise OSError(number, os.strerror(number), name)
        return caught.value

    assert fails(errno.ENOSPC).filename == str(old)
    # Reading what is to be written failed: not this file's fault, and not said to be.
    assert fails(errno.EIO).filename is None
    assert fails(errno.ENOENT, "other").filename == "other"
    if os.name == "posix" and os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError) as caught:
            atomic_write_text(tmp_path / "new", "x")
        tmp_path.chmod(0o700)
        assert caught.value.filename == str(tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda temporary, *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            atomic_write_text(old, "x")

    def full(temporary: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space") as caught:
            atomic_write_text(old, "x")
    assert caught.value.filename == str(old), "not the hidden temporary one"


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_folders_made_for_a_file_that_failed_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "there").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        for path in (tmp_path / "a" / "b" / "c", tmp_path / "there" / "a" / "c"):
            with pytest.raises(OSError, match="No space"):
                atomic_write_text(path, "x")
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_a_folder_that_somebody_else_uses_meanwhile_stays(tmp_path: Path):
    path = tmp_path / "a" / "b" / "c"
    with pytest.raises(RuntimeError), atomic_write(path):  # noqa: PT012
        atomic_write_text(path.with_name("other"), "x")
        raise RuntimeError
    assert path.with_name("other").read_text() == "x"
    assert [p.name for p in path.parent.iterdir()] == ["other"]


@posix
def test_kill_in_the_middle(old: Path):
    script = (
        "import sys, time\n"
        "from sparseft.io.atomic import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(old)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert old.read_bytes() == b"old"
    hidden = [p for p in old.parent.iterdir() if p != old]
    assert [p.name.startswith(".state.bin.") and p.suffix == ".tmp" for p in hidden] == [True]
    atomic_write_text(old, "new")  # what the kill left behind is in nobody's way
    assert old.read_bytes() == b"new"


def test_overwrite_false(old: Path):
    with pytest.raises(FileExistsError, match=r"state\.bin exists already; pass overwrite=True"):
        atomic_write_text(old, "new", overwrite=False)
    assert only(old, b"old")
    atomic_write_text(old.with_name("other"), "new", overwrite=False)


def test_makes_folders_and_refuses_one_as_a_file(tmp_path: Path):
    target = tmp_path / "a" / "b" / "c.txt"
    atomic_write_text(target, "é\n")
    assert target.read_bytes() == "é\n".encode()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        atomic_write_text(tmp_path / "a", "x")


@posix
def test_permissions(tmp_path: Path):
    new, kept = tmp_path / "new", tmp_path / "kept"
    kept.write_text("x")
    kept.chmod(0o640)
    mask = os.umask(0o022)
    try:
        atomic_write_text(new, "y")
        atomic_write_text(kept, "y")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(new.stat().st_mode) == 0o644
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640


@posix
def test_a_symbolic_link_stays(old: Path):
    link = old.parent / "link"
    link.symlink_to(old.name)
    atomic_write_text(link, "new")
    assert link.is_symlink()
    assert old.read_bytes() == b"new"


@posix
def test_longest_name(tmp_path: Path):
    atomic_write_text(tmp_path / ("n" * 255), "x")
    atomic_write_text(tmp_path / ("é" * 127), "x")
    assert len(list(tmp_path.iterdir())) == 2


def test_torch_save_goes_through(tmp_path: Path):
    with atomic_write(tmp_path / "state.pt") as file:
        torch.save({"step": 3, "w": torch.arange(4)}, file)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 3
    assert torch.equal(state["w"], torch.arange(4))


def test_json_is_sorted_and_strict(tmp_path: Path):
    path = tmp_path / "x.json"
    atomic_write_json(path, {"b": 1, "a": ["é"]}, indent=None)
    assert path.read_text(encoding="utf-8") == '{"a": ["é"], "b": 1}\n'
    with pytest.raises(ValueError, match="Out of range"):
        atomic_write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        atomic_write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": ["é"], "b": 1}
