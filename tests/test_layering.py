"""The one-way imports of the package, read from the syntax tree, lazy imports included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "sparseft", ROOT / "kernels" / "sparseft_kernels")

# Lower may not import higher; equal levels may import each other only inside one row.
LAYERS = [
    {"errors", "_text", "_version", "_integrity", "_registry"},
    {"sparseft_kernels", "pattern", "diff"},
    {"ops"},
    {"fingerprint", "adapter", "summary", "io"},
    {"modules"},
    {"selection", "composition", "denoise"},
    {"attachment", "optim"},
    {"data", "training", "evaluation", "profiling", "benchmarking", "peft"},
    {"demo", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The package root re-exports lazily and is below everyone for `__version__`.
EXEMPT = {"sparseft/__init__.py"}


def part_of(module: str) -> str:
    """`sparseft.io.atomic` -> `io`; `sparseft_kernels.compose` -> `sparseft_kernels`."""
    head, _, rest = module.partition(".")
    return head if head == "sparseft_kernels" or not rest else rest.split(".")[0]


def imports_of(path: Path, package_root: Path) -> list[tuple[int, str]]:
    """Return (line, imported module) for each import of ours in the file, at any depth."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = path.relative_to(package_root.parent).with_suffix("").parts
                base = ".".join(parts[: len(parts) - node.level])
                module = f"{base}.{node.module}" if node.module else base
            else:
                module = node.module or ""
            if module == "sparseft":  # from sparseft import x: x is the part, or a lazy public name
                found += [(node.lineno, f"sparseft.{a.name}") for a in node.names]
            else:
                found.append((node.lineno, module))
    return [(n, m) for n, m in found if m.split(".")[0] in ("sparseft", "sparseft_kernels")]


def violations(path: Path, package_root: Path) -> list[str]:
    relative = path.relative_to(package_root.parent)
    me = part_of(".".join(relative.with_suffix("").parts))
    out = []
    for line, module in imports_of(path, package_root):
        other = part_of(module)
        if other in ("sparseft", "__version__"):
            continue
        if other not in LEVEL:
            out.append(
                f"{relative}:{line} imports {module}: not a known part; import it from its module"
            )
        elif me == "sparseft_kernels" and other != "sparseft_kernels":
            out.append(f"{relative}:{line} imports {module}: kernels import only torch and triton")
        elif LEVEL[other] > LEVEL[me]:
            out.append(f"{relative}:{line} imports {module}: {me} lies below {other}")
    return out


def files() -> list[tuple[Path, Path]]:
    return [
        (f, package)
        for package in PACKAGES
        for f in sorted(package.rglob("*.py"))
        if str(f.relative_to(package.parent)) not in EXEMPT
    ]


def test_every_part_has_a_level():
    parts = {part_of(".".join(f.relative_to(p.parent).with_suffix("").parts)) for f, p in files()}
    assert parts - {"sparseft"} <= set(LEVEL), parts - set(LEVEL)


def test_imports_point_one_way():
    bad = [v for f, p in files() for v in violations(f, p)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("ops/x.py", "from sparseft.attachment import attach"),
        ("diff.py", "def f():\n    import sparseft.ops"),
        ("modules/x.py", "from ..training import lottery_ticket"),
        ("io/x.py", "from sparseft import attach"),
    ],
)
def test_a_reverse_import_is_seen(tmp_path: Path, where: str, source: str):
    package = tmp_path / "sparseft"
    file = package / where
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    assert violations(file, package)
