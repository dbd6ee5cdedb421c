"""Library trees to import from: the checkout as it is, and revisions of it, taken out by git.

A revision is unpacked into a temporary folder (`git archive`: the checkout and its .git stay as
they are) and gets the present benchmarks, so that both sides are measured by the same code.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import sparseft
from sparseft.errors import OptionError
from sparseft.evaluation.provenance import git_state

__all__ = ["HERE", "Tree", "checkout_root", "lay_out", "split_revisions"]

HERE = "here"

_ROOT = Path(sparseft.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Tree:
    """One side.

    Attributes:
        label: what was typed, or `HERE`.
        sha: of the commit.
        dirty: whether uncommitted changes are part of it.
        path: the folder to import ``sparseft`` and ``sparseft_kernels`` from.
    """

    label: str
    sha: str
    dirty: bool
    path: Path

    def __str__(self) -> str:
        text = f"{self.label} ({self.sha[:12]}"
        return text + (" with uncommitted changes)" if self.dirty else ")")


def split_revisions(text: str) -> tuple[str, str]:
    """Return (before, after) of ``REV`` (after: `HERE`) or ``A..B``.

    Raises:
        OptionError: neither.
    """
    parts = text.split("..")
    if len(parts) > 2 or not all(parts) or any(p.startswith(("-", ".")) for p in parts):
        raise OptionError(f"--compare {text!r}: wanted a revision, or two as A..B.")
    return (parts[0], parts[1]) if len(parts) == 2 else (parts[0], HERE)


def checkout_root() -> Path:
    """Return the checkout that sparseft is imported from.

    Raises:
        OptionError: there is none, or no git.
    """
    if shutil.which("git") is None:
        raise OptionError("--compare needs git, which is not on the PATH.")
    if not (_ROOT / ".git").exists():
        raise OptionError(
            f"--compare needs a git checkout of sparseft; this one is imported from {_ROOT}, which "
            "is none. Clone the repository and `pip install -e .` there."
        )
    return _ROOT


def lay_out(label: str, root: Path, folder: Path) -> Tree:
    """Make a folder to import one side from.

    Args:
        label: a revision, or `HERE`.
        root: of `checkout_root`.
        folder: an empty one, which the caller removes.

    Raises:
        OptionError: no such revision, or one without the library.
    """
    if label == HERE:
        state = git_state(root)
        sha, dirty, source = (state or {}).get("sha", "?"), bool((state or {}).get("dirty")), root
    else:
        sha, dirty, source = _sha(root, label), False, folder / "tree"
        _unpack(root, sha, source)
        if not (source / "sparseft" / "__init__.py").exists():
            raise OptionError(f"--compare: {label} has no sparseft/ yet; take a later revision.")
        present = source / "sparseft" / "benchmarking"
        shutil.rmtree(present, ignore_errors=True)
        shutil.copytree(
            Path(__file__).parent, present, ignore=shutil.ignore_patterns("__pycache__")
        )
    path = folder / "path"
    path.mkdir(parents=True)
    # The tree itself on the path would make its folder kernels/ a package of that name, which
    # others take for Hugging Face's.
    (path / "sparseft").symlink_to(source / "sparseft", target_is_directory=True)
    kernels = source / "kernels" / "sparseft_kernels"
    if kernels.is_dir():
        (path / "sparseft_kernels").symlink_to(kernels, target_is_directory=True)
    return Tree(label, sha, dirty, path)


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=300)


def _sha(root: Path, revision: str) -> str:
    found = _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if found.returncode:
        raise OptionError(
            f"--compare: {root} has no revision {revision!r}; wanted a commit, branch or tag "
            "(`git log --oneline` shows some)."
        )
    return found.stdout.decode().strip()


def _unpack(root: Path, sha: str, into: Path) -> None:
    packed = _git(root, "archive", "--format=tar", sha, "sparseft", "kernels")
    if packed.returncode:  # before there were kernels
        packed = _git(root, "archive", "--format=tar", sha)
    if packed.returncode:
        raise OptionError(f"--compare: git archive {sha}: {packed.stderr.decode().strip()}.")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        # Python before 3.10.12 has no filters; what is unpacked is this repository's own.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(into, **safe)  # type: ignore[arg-type]
