"""A lottery ticket that is stopped, continued, repeated; what its folder and its file hold."""

from __future__ import annotations

import json

import pytest
import torch

from sparseft.errors import ResumeError


def test_a_finished_run_is_not_run_again(run, tiny, make, tmp_path):
    first = run(make(), tiny.tiny_classifier(), tmp_path)

    def never(model, phase):
        raise AssertionError("a finished phase was built again")

    again = run(never, tiny.tiny_classifier(), tmp_path)
    assert again.adapter.digest == first.adapter.digest
    assert again.history == first.history
    assert {h["phase"] for h in again.history} == {
        "iteration-0/dense",
        "iteration-0/sparse-nnz-500",
    }


def test_heads_initialised_anew_do_not_change_a_continued_run(run, tiny, make, tmp_path):
    def model(head_seed):
        m = tiny.tiny_classifier()
        torch.manual_seed(head_seed)
        torch.nn.init.normal_(m.classifier.weight)
        return m

    class Stop(Exception):
        pass

    def stop_in_sparse(m, phase):
        if phase.name == "sparse":
            raise Stop

    whole = run(make(), model(1), tmp_path / "a")
    with pytest.raises(Stop):
        run(make(on_phase=stop_in_sparse), model(1), tmp_path / "b")
    resumed = run(make(), model(2), tmp_path / "b")
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_an_error_leaves_the_model_as_it_was(run, tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    for where in ("dense", "sparse"):

        def interrupt(m, phase, where=where):
            if phase.name == where:
                with torch.no_grad():
                    m.bert.pooler.dense.weight.add_(1) if where == "dense" else None
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(make(on_phase=interrupt), model, tmp_path)
        assert tiny.same_bits(before, tiny.bits(model)), where
        assert all(p.requires_grad for p in model.parameters())
    run(make(), model, tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: was 0, now 1"),
        ({"nnz": 501}, r"nnz: was \[500\], now \[501\]"),
        ({"l1": 0.1}, "l1: was"),
        ({"exclude": ()}, "candidates: was"),
    ],
)
def test_continuing_with_other_settings_names_the_keys(run, tiny, make, tmp_path, change, named):
    run(make(), tiny.tiny_classifier(), tmp_path)
    with pytest.raises(ResumeError, match=named):
        run(make(), tiny.tiny_classifier(), tmp_path, **change)
    assert run(make(), tiny.tiny_classifier(), tmp_path, resume=False, **change).adapter.nnz


def test_continuing_on_another_base_or_with_another_trainer_is_refused(run, tiny, make, tmp_path):
    class Stop(Exception):
        pass

    class Crash:
        def on_pre_optimizer_step(self, *, step, model, optimizer):
            raise Stop

    def crashing(model, phase):
        trainer = make()(model, phase)
        trainer.add_callback(Crash())
        return trainer

    with pytest.raises(Stop):
        run(crashing, tiny.tiny_classifier(), tmp_path)
    with pytest.raises(ResumeError, match="base: was"):
        run(make(), tiny.tiny_classifier(seed=1), tmp_path)
    with pytest.raises(ResumeError, match=r"'iteration-0/dense'.*\n  steps: was 6, now 7"):
        run(make(steps=7), tiny.tiny_classifier(), tmp_path)


def test_theta0_may_be_a_file_of_the_base_that_is_not_copied(run, tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    base = tmp_path / "base"
    model.save_pretrained(base)
    file = base / "model.safetensors"
    plain = run(make(), model, tmp_path / "plain")
    shared = run(make(), model, tmp_path / "shared", theta0=file)
    assert shared.path.read_bytes() == plain.path.read_bytes()
    size = {f: (tmp_path / f / "theta0.safetensors").stat().st_size for f in ("plain", "shared")}
    assert size["shared"] < size["plain"] / 10

    class Stop(Exception):
        pass

    def stop_in_sparse(m, phase):
        if phase.name == "sparse":
            raise Stop

    with pytest.raises(Stop):
        run(make(on_phase=stop_in_sparse), model, tmp_path / "stopped", theta0=file)
    with pytest.raises(ResumeError, match="pass the same theta0"):
        run(make(), model, tmp_path / "stopped")
    tiny.tiny_classifier(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ResumeError, match="another file or another base"):
        run(make(), model, tmp_path / "stopped", theta0=tmp_path / "other" / "model.safetensors")
    again = run(make(), model, tmp_path / "stopped", theta0=file)
    assert again.path.read_bytes() == plain.path.read_bytes()


def test_the_adapter_file_holds_no_path_and_no_time(run, tiny, make, tmp_path):
    folder = tmp_path / "somewhere-particular"
    a = run(make(), tiny.tiny_classifier(), folder, metadata={"data": {"rows": 48}})
    b = run(make(), tiny.tiny_classifier(), tmp_path / "b", metadata={"data": {"rows": 48}})
    assert a.path.read_bytes() == b.path.read_bytes()
    assert b"somewhere-particular" not in a.path.read_bytes()
    assert a.adapter.metadata.extra["data"] == {"rows": 48}
    assert a.adapter.metadata.method == "lottery_ticket/magnitude"
    state = json.loads((folder / "state.json").read_text())
    assert state["phases"]["iteration-0/dense"]["status"] == "done"


def test_a_full_disk_while_saving_keeps_the_old_adapter(run, tiny, make, tmp_path, monkeypatch):
    result = run(make(), tiny.tiny_classifier(), tmp_path)
    old = result.path.read_bytes()
    import os

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        result.adapter.save(result.path)
    monkeypatch.undo()
    assert result.path.read_bytes() == old
    assert [p.name for p in result.path.parent.iterdir()] == ["adapter.safetensors"]
