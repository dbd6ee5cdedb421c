"""The examples run as they are, and what was stopped and resumed ends in the same bits."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparseft import Adapter

HERE = Path(__file__).resolve().parent
SCRIPTS = [
    "plain_loop", "ddp_loop", "fsdp_loop", "trainer", "accelerate_loop", "lightning_loop",
]  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """``run(script, *arguments)`` as `python script.py` would, without importing torch again."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)

    def call(script, *arguments):
        if script == "lightning_loop" and importlib.util.find_spec("lightning") is None:
            pytest.skip("lightning is not installed (pip install lightning)")
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        try:
            runpy.run_path(str(HERE / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            return str(end)
        return capsys.readouterr().out

    return call


def accuracies(printed):
    return [float(line.split("accuracy ")[1]) for line in printed.splitlines() if "acy " in line]


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(script, run):
    """Stopped after step 25 of 54, 18 to an epoch; the last checkpoint is that of step 20."""
    attached, fresh = accuracies(run(script, "--out", "whole"))
    assert attached == fresh, "the adapter carries all that was learned"
    assert fresh >= 0.9, "of two classes"
    assert "step 25" in run(script, "--out", "again", "--stop-after", 25)
    assert not Path("again/adapter").exists()
    run(script, "--out", "again", "--resume")
    assert Adapter.load("again/adapter").digest == Adapter.load("whole/adapter").digest


def test_compact_checkpoints_of_the_trainer(run):
    options = ("--compact", "--epochs", 2, "--save-every", 8)
    run("trainer", "--out", "whole", *options)
    assert "step 11" in run("trainer", "--out", "again", "--stop-after", 11, *options)
    model = Path("again/checkpoint-8/model.safetensors")
    assert model.stat().st_size < 30_000, "frozen weights are 180 kB"
    printed = run("trainer", "--out", "again", "--resume", *options)
    digest = Adapter.load("whole/adapter").digest
    assert Adapter.load("again/adapter").digest == digest
    best = int(printed.split("best step: ")[1].split(" ")[0])
    assert Adapter.load(f"again/checkpoint-{best}/adapter").digest == digest


def test_the_trainer_in_bf16(run):
    attached, fresh = accuracies(run("trainer", "--bf16"))
    assert min(attached, fresh) >= 0.9, "evaluated in fp32"
    assert Adapter.load("sparse-run/adapter").nnz == 2232


def test_accelerate_killed_while_it_writes_its_second_checkpoint(run, monkeypatch):
    """After the model and before the rest: the first checkpoint is left as it was."""
    from accelerate import accelerator

    plain, saves = accelerator.save_custom_state, []

    def dies(*arguments, **options):
        saves.append(arguments)
        if len(saves) == 2:
            raise SystemExit("killed")
        return plain(*arguments, **options)

    assert "no checkpoint" in run("accelerate_loop", "--resume")
    run("accelerate_loop", "--out", "whole")
    with monkeypatch.context() as patched:
        patched.setattr(accelerator, "save_custom_state", dies)
        assert run("accelerate_loop") == "killed"
    run("accelerate_loop", "--resume")
    assert Adapter.load("sparse-run/adapter").digest == Adapter.load("whole/adapter").digest
    assert [path.name for path in Path("sparse-run").glob("*-*")] == ["checkpoint-50"]


@pytest.mark.parametrize("kills", [(5, 5), (19, 21)], ids=["within_a_step", "around_an_epoch"])
def test_lightning_killed_twice_while_it_writes_a_checkpoint(kills, run, monkeypatch):
    """Each kill leaves half a file; ModelCheckpoint ends in other bits, see the example."""
    trainer = pytest.importorskip("lightning", reason="lightning is not installed").Trainer
    plain, options = trainer.save_checkpoint, ("--epochs", 2, "--save-every", 1)

    def dying(step):
        def save(self, path, *rest, **more):
            if self.global_step >= step:
                Path(path).write_bytes(b"half")
                raise SystemExit("killed")
            plain(self, path, *rest, **more)

        return save

    assert "no checkpoint" in run("lightning_loop", "--resume")
    run("lightning_loop", "--out", "whole", *options)
    for step, resume in zip(kills, [(), ("--resume",)], strict=True):
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "save_checkpoint", dying(step))
            assert run("lightning_loop", *options, *resume) == "killed"
    run("lightning_loop", *options, "--resume")
    assert Adapter.load("sparse-run/adapter").digest == Adapter.load("whole/adapter").digest


@pytest.mark.parametrize("script", ["plain_loop", "trainer"])
def test_a_model_and_data_of_ones_own(script, run):
    sys.modules.pop("task", None)
    import task

    args = task.arguments("A test.").parse_args([])
    model, _, _, collate = task.load(args)
    model.save_pretrained("base")
    collate.tokenizer.save_pretrained("base")
    rows = "".join(f"{text}\t{label}\n" for text, label in task.made_up())
    Path("train.tsv").write_text(rows, encoding="utf-8")
    attached, fresh = accuracies(run(script, "--model", "base", "--data", "train.tsv"))
    assert attached == fresh
    assert fresh >= 0.9


def test_a_script_of_its_own_process_killed_at_any_moment(run):
    """SIGKILL some steps after the first checkpoint, perhaps while another is written."""
    options = ("--epochs", "6", "--save-every", "3")
    command = [sys.executable, str(HERE / "plain_loop.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not Path("sparse-run/checkpoint.pt").is_file():
            assert process.poll() is None, "ended before its first checkpoint"
            time.sleep(0.005)
        process.kill()
    assert process.returncode != 0, "killed, not finished"
    assert not Path("sparse-run/adapter").exists()
    attached, fresh = accuracies(run("plain_loop", *options, "--resume"))
    assert attached == fresh
    run("plain_loop", *options, "--out", "whole")
    assert Adapter.load("sparse-run/adapter").digest == Adapter.load("whole/adapter").digest
