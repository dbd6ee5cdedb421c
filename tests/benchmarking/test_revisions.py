"""Two revisions in turns: who is timed when, what one side lacks, and that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparseft.benchmarking import cases, revisions, trees, worker
from sparseft.benchmarking.planning import plan_cases
from sparseft.benchmarking.revisions import SideFailed, compare_revisions
from sparseft.benchmarking.suite import Contender
from sparseft.benchmarking.trees import HERE, Tree, checkout_root, lay_out, split_revisions
from sparseft.errors import OptionError

ROOT = Path(__file__).resolve().parents[2]


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Three commits: without a library, with one, with kernels and old benchmarks too."""
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    for number, files in enumerate(
        (
            {"README.md": "x"},
            {"sparseft/__init__.py": "old = 1"},
            {
                "kernels/sparseft_kernels/__init__.py": "",
                "sparseft/benchmarking/__init__.py": "raise ImportError",
                "sparseft/benchmarking/gone.py": "",
            },
        )
    ):
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        git(root, "add", "-A")
        git(root, "commit", "-qm", "c")
        git(root, "tag", f"v{number}")
    monkeypatch.setattr(trees, "_ROOT", root)
    return root


# Trees.


def test_one_revision_is_against_here_and_two_against_each_other():
    assert split_revisions("HEAD~2") == ("HEAD~2", HERE)
    assert split_revisions("v1..main") == ("v1", "main")


@pytest.mark.parametrize("text", ["..", "a..", "..b", "a...b", "a..b..c", "--output=x", "a..-b"])
def test_anything_else_is_refused(text):
    with pytest.raises(OptionError, match="wanted a revision, or two as"):
        split_revisions(text)


def test_a_revision_gets_the_present_benchmarks_and_the_checkout_stays(repository, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in repository.rglob("*")}
    tree = lay_out("v2", repository, tmp_path / "side")
    assert tree.sha == git(repository, "rev-parse", "v2")
    assert not tree.dirty
    assert (tree.path / "sparseft" / "__init__.py").read_text() == "old = 1"
    assert (tree.path / "sparseft_kernels" / "__init__.py").exists()
    present = {p.name for p in Path(trees.__file__).parent.glob("*.py")}
    assert {p.name for p in (tree.path / "sparseft" / "benchmarking").glob("*.py")} == present
    assert "kernels" not in os.listdir(tree.path)  # that name is Hugging Face's
    after = {p: p.stat().st_mtime_ns for p in repository.rglob("*")}
    assert after == before
    assert git(repository, "worktree", "list").count("\n") == 0


def test_here_is_the_working_tree_with_its_changes(repository, tmp_path):
    (repository / "sparseft" / "__init__.py").write_text("new = 1")
    tree = lay_out(HERE, repository, tmp_path / "side")
    assert tree.dirty
    assert (tree.path / "sparseft" / "__init__.py").read_text() == "new = 1"
    assert "here" in str(tree)
    assert "with uncommitted changes" in str(tree)


def test_a_revision_before_the_kernels_can_be_laid_out(repository, tmp_path):
    tree = lay_out("v1", repository, tmp_path / "side")
    assert sorted(os.listdir(tree.path)) == ["sparseft"]


def test_what_is_no_revision_is_refused(repository, tmp_path):
    with pytest.raises(OptionError, match="has no revision 'v9'; wanted a commit, branch or tag"):
        lay_out("v9", repository, tmp_path / "a")
    with pytest.raises(OptionError, match="v0 has no sparseft/ yet"):
        lay_out("v0", repository, tmp_path / "b")


def test_no_checkout_and_no_git_are_said(repository, tmp_path, monkeypatch):
    assert checkout_root() == repository
    monkeypatch.setattr(trees, "_ROOT", tmp_path / "site-packages")
    with pytest.raises(OptionError, match="site-packages, which is none"):
        checkout_root()
    monkeypatch.setattr(trees.shutil, "which", lambda name: None)
    with pytest.raises(OptionError, match="needs git, which is not on the PATH"):
        checkout_root()


# Turns, without processes.


class Fake:
    """A side in this process; the older one has an op of fewer rows."""

    log: list[tuple[str, str, str]] = []
    older = None

    def __init__(self, tree, folder):
        self.tree, self.side = tree, worker.Side()

    def ask(self, do, **words):
        Fake.log.append((self.tree.label, do, words.get("contender", "")))
        bench = Fake.older if self.tree.label == "v1" else Fake.newer
        original = cases.benches_of
        cases.benches_of = lambda file: (bench,)
        try:
            return getattr(self.side, do)(**words)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            cases.benches_of = original

    def end(self):
        Fake.log.append((self.tree.label, "end", ""))


@pytest.fixture
def fake(monkeypatch, adding):
    Fake.log, Fake.older, Fake.newer = [], adding(), adding()
    monkeypatch.setattr(revisions, "_Process", Fake)
    monkeypatch.setattr(revisions, "checkout_root", lambda: Path("/"))
    monkeypatch.setattr(
        revisions, "lay_out", lambda label, root, folder: Tree(label, "abc", False, folder)
    )

    def compare(op, **options):
        planned = plan_cases([op], "tiny", shapes=["4x4"], densities=[0.01])
        [result] = compare_revisions("v1", planned, "cpu", files=lambda op: "x", **options)
        return result

    return compare


def test_sides_take_turns_and_the_control_runs_beside_ours(fake, adding):
    result = fake(adding(), rounds=4, warmup=2)
    assert result["status"] == "ok"
    assert (result["before"], result["after"]) == ("v1 (abc)", "here (abc)")
    timed = [(side, name) for side, do, name in Fake.log if do == "time"]
    assert [side for side, name in timed if name == "2 * a"] == ["v1", HERE, HERE, "v1"] * 2
    assert [side for side, name in timed if name == "ours, 1%"] == [HERE, "v1", "v1", HERE] * 2
    assert [(row["name"], row["control"]) for row in result["contenders"]] == [
        ("2 * a", True),
        ("ours, 1%", False),
    ]
    for row in result["contenders"]:
        assert row["rounds"] == 4
        pairs = zip(row["samples"]["after"], row["samples"]["before"], strict=True)
        ratios = sorted(new / old for new, old in pairs)
        assert row["ratio"]["min"] == pytest.approx(ratios[0])
        assert row["ratio"]["median"] == pytest.approx((ratios[1] + ratios[2]) / 2)
    assert Fake.log[-2:] == [(HERE, "end", ""), ("v1", "end", "")]
    json.dumps(result)


def test_rounds_end_with_the_time(fake, adding):
    result = fake(adding(), rounds=50, seconds=1e-9)
    assert {row["rounds"] for row in result["contenders"]} == {2}


def test_what_the_older_side_cannot_build_is_listed_with_the_reason(fake, adding):
    def build(*arguments):
        raise ImportError("cannot import name 'new_op' from 'sparseft.ops'")

    Fake.older = adding(build=build)
    result = fake(adding())
    assert result["status"] == "not in v1"
    assert "ImportError: cannot import name 'new_op'" in result["reason"]
    Fake.older, Fake.newer = adding(), Fake.older
    assert fake(adding())["status"] == "error"


def test_a_contender_that_is_wrong_on_one_side_has_no_time(fake, adding):
    Fake.older = adding(wrong=True)
    row = fake(adding(), rounds=2)["contenders"][1]
    assert row["status"] == "not in v1"
    assert "entries that differ: 16" in row["reason"]
    assert "ratio" not in row
    Fake.older, Fake.newer = adding(), adding(wrong=True)
    result = fake(adding(), rounds=2)
    assert result["status"] == result["contenders"][1]["status"] == "red"


def test_a_side_that_dies_costs_its_case_and_all_is_ended(fake, adding, monkeypatch):
    def dead(self, **words):
        raise SideFailed("the process was killed")

    monkeypatch.setattr(worker.Side, "build", dead)

    def ask(self, do, **words):
        return getattr(self.side, do)(**words)

    monkeypatch.setattr(Fake, "ask", ask)
    result = fake(adding())
    assert (result["status"], result["reason"]) == ("error", "the process was killed")
    assert ("v1", "end", "") in Fake.log


def test_ctrl_c_ends_both_sides_and_removes_the_folder(fake, adding, monkeypatch):
    folders = []

    def lay_out(label, root, folder):
        folders.append(folder)
        return Tree(label, "abc", False, folder)

    def interrupted(self, **words):
        assert folders[0].is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(revisions, "lay_out", lay_out)
    monkeypatch.setattr(Fake, "ask", lambda self, do, **words: interrupted(self))
    with pytest.raises(KeyboardInterrupt):
        fake(adding())
    assert [entry[1] for entry in Fake.log] == ["end", "end"]
    assert not any(folder.exists() for folder in folders)


def test_short_runs_are_repeated_and_long_ones_run_once():
    side = worker.Side()
    runs = []

    class Watch:
        def time(self, run, lead):
            run()
            return float(len(runs)), 0.0

    side.watch = Watch()
    side.contenders = {"a": Contender(lambda: runs.append(1))}
    side.leads = {"a": 0.5e-3}
    assert side.time(contender="a") == {"seconds": 3.5}  # one untimed, then 2, 3, 4, 5
    runs.clear()
    side.leads = {"a": 1.0}
    assert side.time(contender="a") == {"seconds": 1.0}


# Real processes.


@pytest.fixture
def process(tmp_path, monkeypatch):
    """A side whose worker is ``code``."""
    made = []

    def start(code):
        path = tmp_path / "path"
        path.mkdir()
        (path / "probe.py").write_text(code)
        start_real = subprocess.Popen

        def popen(command, **options):
            return start_real([sys.executable, "-S", str(path / "probe.py")], **options)

        monkeypatch.setattr(revisions.subprocess, "Popen", popen)
        side = revisions._Process(Tree("v1", "abc", False, path), tmp_path)
        made.append(side)
        return side

    yield start
    for side in made:
        side.end()


def test_a_process_that_ends_leaves_its_last_words(process):
    side = process("import sys; sys.exit('no such symbol')")
    with pytest.raises(SideFailed, match=r"v1 \(abc\) ended with 1: no such symbol"):
        side.ask("drop")


def test_a_library_from_elsewhere_is_refused(process):
    side = process("""input(); print('{"file": "/elsewhere/sparseft/__init__.py"}', flush=True)""")
    with pytest.raises(SideFailed, match="was not imported, but /elsewhere/sparseft"):
        side.ask("drop")
    assert side.process is None


def test_a_process_that_does_not_end_by_itself_is_killed(process, monkeypatch):
    code = 'import time\nwhile True:\n  try: input(); print(\'{"file": "%s"}\', flush=True)\n'
    side = process(code + "  except EOFError: time.sleep(60)")
    monkeypatch.setattr(revisions, "_PATIENCE", 0.1)
    with pytest.raises(SideFailed, match="was not imported"):
        side.ask("drop")
    assert side.process is None


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
def test_the_last_commit_against_here_and_ctrl_c(tmp_path):
    command = [sys.executable, "-m", "sparseft", "bench", "--op", "capture", "--device", "cpu"]
    command += ["--compare", "HEAD", "--json", "-"]
    environment = dict(os.environ) | {"TMPDIR": str(tmp_path), "PYTHONPATH": ".:kernels"}
    options = {"cwd": ROOT, "env": environment, "text": True, "start_new_session": True}
    before = git(ROOT, "worktree", "list").count("\n")
    done = subprocess.run([*command, "--size", "tiny"], capture_output=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["status"] for line in lines} == {"ok"}
    assert [line["control"] for line in lines].count(True) == 1
    assert all(line["ratio"]["median"] > 0 for line in lines)
    assert os.listdir(tmp_path) == []
    endless = [*command, "--size", "cpu", "--seconds", "600", "--rounds", "100000"]
    process = subprocess.Popen(endless, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    for line in process.stderr:
        if line.startswith("ratios"):
            break
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert os.listdir(tmp_path) == []
    assert git(ROOT, "worktree", "list").count("\n") == before
