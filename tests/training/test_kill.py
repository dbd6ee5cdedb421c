"""SIGKILL at random moments of either phase, the same command again: the same adapter (P8)."""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import textwrap
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")

# Given: folder, kind, say (the end of a pipe), errors (a file).
SCRIPT = textwrap.dedent(
    """
    import importlib.util, signal, sys, torch
    torch.set_num_threads(1)
    sys.stderr = open(errors, "w")
    # Whatever started the tests in the background made them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    spec = importlib.util.spec_from_file_location("_tiny", {tiny!r})
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    from sparseft.training import LoopTrainer, lottery_ticket

    rows = tiny.Rows(40)

    def make_trainer(model, phase):
        say.send(phase.name)
        if kind == "loop":
            return LoopTrainer(
                model, rows, output_dir=phase.output_dir, seed=phase.seed, steps=150,
                batch_size=4, lr=1e-3, collate=tiny.collate, save_every=5,
            )
        import transformers
        arguments = transformers.TrainingArguments(
            output_dir=str(phase.output_dir), max_steps=25, per_device_train_batch_size=4,
            learning_rate=1e-3, save_strategy="steps", save_steps=2, save_total_limit=2,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
        )
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)

    result = lottery_ticket(
        make_trainer,
        tiny.plain_classifier() if kind == "loop" else tiny.tiny_classifier(),
        nnz=700, output_dir=folder, exclude=["*norm*" if kind == "loop" else "*LayerNorm*"],
        full_params=["classifier.*"], l1=0.01, seed=3,
    )
    say.send("finished")
    """
).format(tiny=str(Path(__file__).with_name("_tiny.py")))


@dataclass
class Run:
    """A process that trains: what it says on its way, and where its errors go."""

    process: BaseProcess
    heard: Connection
    errors: Path

    def says(self) -> str:
        """Return the phase it has come to, "finished", or "" if it has ended without."""
        try:
            return self.heard.recv()
        except EOFError:
            return ""

    def end(self, timeout: float) -> None:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the run does not end"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """``command(folder, kind)``: a process, forked where torch has been imported once for all."""
    script = tmp_path_factory.mktemp("script") / "run.py"
    script.write_text(SCRIPT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sparseft.training"])

    def start(folder: Path, kind: str) -> Run:
        heard, say = context.Pipe(duplex=False)
        errors = tmp_path_factory.mktemp("errors") / "stderr.txt"
        given = {"folder": str(folder), "kind": kind, "say": say, "errors": str(errors)}
        process = context.Process(target=runpy.run_path, args=(str(script), given), daemon=True)
        process.start()
        say.close()  # so that the pipe ends with the process
        return Run(process, heard, errors)

    return start


def finish(run: Run, folder: Path) -> bytes:
    said = list(iter(run.says, ""))
    run.end(300)
    assert run.process.exitcode == 0, run.errors.read_text()
    assert said[-1] == "finished"
    return (folder / "iteration-0" / "adapter-nnz-700" / "adapter.safetensors").read_bytes()


def kill_in(run: Run, phase: str, delay: float) -> bool:
    """Wait for a phase, then ``delay`` seconds, then kill; False if the run had ended by then."""
    for said in iter(run.says, ""):
        if said in (phase, "finished"):
            break
    time.sleep(delay)
    alive = run.process.is_alive()
    run.process.kill()
    run.end(60)
    return alive


@pytest.fixture(scope="module")
def expected(command, tmp_path_factory):
    """kind -> the adapter of a run that nobody disturbs, made once."""
    found: dict[str, bytes] = {}

    def of(kind: str) -> bytes:
        if kind not in found:
            whole = tmp_path_factory.mktemp(f"whole-{kind}")
            found[kind] = finish(command(whole, kind), whole)
        return found[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("loop", [("dense", 0.15), ("sparse", 0.15)]),
        # test_lottery_hf.py interrupts a Trainer at chosen steps inside one process, every time.
        pytest.param("trainer", [("dense", 1.0), ("sparse", 1.0)], marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_the_bytes_are_the_same(tmp_path, command, expected, kind, kills):
    killed = tmp_path / "killed"
    moments = random.Random()  # other moments each time; shown when the comparison fails
    landed = []
    for phase, around in kills:
        delay = moments.uniform(0.0, 2 * around)
        landed.append((phase, delay, kill_in(command(killed, kind), phase, delay)))
    assert finish(command(killed, kind), killed) == expected(kind), landed
    assert any(alive for *_, alive in landed), "every kill came after the end"
    assert not list(killed.rglob(".*.tmp"))


def test_ctrl_c_leaves_a_state_that_goes_on(tmp_path, command, expected):
    stopped = tmp_path / "stopped"
    run = command(stopped, "loop")
    assert run.says() == "dense"
    time.sleep(0.1)
    os.kill(run.process.pid, signal.SIGINT)
    run.end(60)
    assert "KeyboardInterrupt" in run.errors.read_text()
    assert finish(command(stopped, "loop"), stopped) == expected("loop")
