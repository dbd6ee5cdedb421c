"""`track`: silent in a pipe, a line in a terminal, a last line where asked for."""

from __future__ import annotations

import io
import logging

import pytest
import torch

from sparseft import SparseAdamW, TrainingMeter, attach, track
from sparseft.errors import AttachError

LOADER = [torch.tensor([[1, 2, 3], [3, 2, 1]])] * 4


class Terminal(io.StringIO):
    def isatty(self):
        return True


def attached():
    torch.manual_seed(0)
    model = torch.nn.Embedding(10, 4)
    sparse = attach(model, {"weight": torch.ones(10, 4) > 0})
    return model, sparse, SparseAdamW(sparse.parameters(), lr=0.1)


def run(batches, **options):
    model, sparse, optimizer = attached()
    seen = []
    for ids in track(batches, sparse, optimizer, **options):
        seen.append(ids)
        model(ids).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen, sparse, optimizer


def test_it_is_silent_where_there_is_no_terminal(capsys):
    out = io.StringIO()
    seen, sparse, optimizer = run(LOADER, file=out)
    assert seen == LOADER
    assert out.getvalue() == ""
    assert capsys.readouterr() == ("", "")
    assert not optimizer._optimizer_step_pre_hooks
    assert [row.no_gradient for row in sparse.report()] == [28]


def test_a_last_line_where_asked_for():
    out = io.StringIO()
    run(LOADER, file=out, final=True, description="fit")
    assert out.getvalue().startswith("fit: 4 batches, nnz 40 (100%), trained state 960 B, ")
    assert out.getvalue().endswith(" tokens/s\n")
    assert out.getvalue().count("\n") == 1
    out = io.StringIO()
    _, sparse, _ = attached()
    assert list(track([0.5], sparse, file=out, final=True)) == [0.5]
    assert out.getvalue() == "training: 1 batches, nnz 40 (100%), trained state 640 B\n"


def test_a_line_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("sparseft.training.progress._REFRESH", 0.0)
    out = Terminal()
    run(LOADER, file=out)
    text = out.getvalue()
    assert "nnz 40 (100%), trained state" in text
    assert "tokens/s" in text
    assert "4/4" in text


def test_where_there_is_no_more_than_a_place_to_write(monkeypatch):
    class Log:
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    log = Log()
    run(LOADER, file=log, final=True)
    assert log.text.startswith("training: 4 batches")
    monkeypatch.setattr("sys.stderr", None)  # as under pythonw
    assert run(LOADER, final=True)[0] == LOADER


@pytest.mark.parametrize("sized", ["iterator", "refusing", "given"])
def test_batches_of_unknown_number(sized):
    class Refusing:
        def __iter__(self):
            return iter(LOADER)

        def __len__(self):
            raise TypeError("an IterableDataset has no len()")

    batches = Refusing() if sized == "refusing" else iter(LOADER)
    total = 4 if sized == "given" else None
    seen, _, _ = run(batches, file=Terminal(), total=total)
    assert seen == LOADER


def test_leaving_early_takes_the_hook_away(caplog):
    caplog.set_level(logging.WARNING)
    model, sparse, optimizer = attached()
    batches = track(LOADER, sparse, optimizer, file=io.StringIO())
    for _ in batches:
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        break
    batches.close()
    assert not optimizer._optimizer_step_pre_hooks
    assert "never got a gradient" not in caplog.text


def test_epochs_share_what_was_seen_and_warn_once(caplog):
    caplog.set_level(logging.WARNING)
    model, sparse, optimizer = attached()
    meter = TrainingMeter(sparse, optimizer)
    for token in (1, 5):
        for ids in track([torch.tensor([[token, 0]])], sparse, optimizer, meter=meter):
            model(ids).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [row.no_gradient for row in sparse.report()] == [40 - 3 * 4]
    assert meter.counted == 4
    assert meter.steps == 2
    assert caplog.text.count("never got a gradient") == 1


def test_an_optimizer_that_accelerate_has_prepared():
    accelerate = pytest.importorskip("accelerate", reason="pip install accelerate")
    model, sparse, optimizer = attached()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(optimizer)
    for ids in track(LOADER, sparse, prepared, file=io.StringIO()):
        accelerator.backward(model(ids).sum())
        prepared.step()
        prepared.zero_grad()
    assert [row.no_gradient for row in sparse.report()] == [28]
    assert not optimizer._optimizer_step_pre_hooks


def test_what_it_refuses_is_refused_before_the_first_batch():
    model, sparse, optimizer = attached()
    with pytest.raises(AttachError, match="reads an Attachment, got Embedding"):
        track(LOADER, model, optimizer)
    with pytest.raises(AttachError, match="got 'adam'"):
        track(LOADER, sparse, "adam")
    with pytest.raises(AttachError, match="optimizer is a list, and one is looked at"):
        track(LOADER, sparse, [optimizer])
    sparse.detach()
    with pytest.raises(AttachError, match="detached"):
        track(LOADER, sparse, optimizer)
