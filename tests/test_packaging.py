"""What packaging needs: no shadowed package, every folder a package, one version."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "sparseft", ROOT / "kernels" / "sparseft_kernels"]


def test_no_top_level_kernels_package_of_ours():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is not None, f"kernels resolves to {spec}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_every_folder_with_modules_is_a_package(source: Path):
    folders = {f.parent for f in source.rglob("*.py")}
    missing = [str(d.relative_to(ROOT)) for d in folders if not (d / "__init__.py").is_file()]
    assert not missing, "a wheel built from packages.find would leave these out"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_no_empty_rooms(source: Path):
    for init in source.rglob("__init__.py"):
        others = [f for f in init.parent.iterdir() if f.name not in ("__init__.py", "__pycache__")]
        assert others, f"{init.parent} holds nothing"


def test_runs_uninstalled_from_the_checkout(tmp_path: Path):
    """A machine with no install rights runs from the path alone, version lookup included."""
    version = re.search(r'"(.+)"', (ROOT / "sparseft" / "_version.py").read_text().split("=")[1])
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "sparseft", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert version
    assert version[1] in done.stdout


def test_every_public_name_is_in_the_readme():
    import sparseft

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [n for n in sparseft.__all__ if not n.startswith("__") and n not in readme]
    assert not missing, f"README.md does not mention {missing}"


def test_public_names_resolve_to_what_they_say():
    import sparseft

    for name in sparseft.__all__:
        assert getattr(sparseft, name) is not None
    assert set(sparseft.__all__) <= set(dir(sparseft))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sparseft.no_such_name
