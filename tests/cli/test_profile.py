"""``sparseft profile``: its table, files and refusals."""

from __future__ import annotations

import json

import pytest

from sparseft.cli.main import BAD_INPUT, OK, main
from sparseft.profiling import profiles
from sparseft.profiling.measure import measure_here

TINY = ["profile", "--model", "tiny-encoder", "--batch", "2", "--length", "8"]


def numbers(row: str) -> list[float]:
    return [float(cell) for cell in row.split()[-7:]]


def test_predictions(capsys, tmp_path):
    words = [*TINY, "--density", "0.1", "1", "--ways", "attached,dense,frozen", "--predict-only"]
    words += ["--fits", "1GiB", "1kiB"]
    assert main([*words, "--out", str(tmp_path / "out")]) == OK
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    found = {line.split()[0]: numbers(line) for line in lines if line.startswith((" d", " frozen"))}
    for *parts, peak in found.values():
        assert sum(parts) == pytest.approx(peak, abs=0.31), "the parts add up"
    assert found["dense"][3] > found["frozen"][3] == 0, "an optimizer and none"
    assert sum(line.startswith(" attached") for line in lines) == 2
    assert "Nothing measured." in out
    assert "largest density that fits in 1GiB: 1 (predicted peak" in out
    assert "largest density that fits in 1kiB: none; with next to nothing trained" in out
    document = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [fit["density"] for fit in document["fits"]] == [1.0, None]
    assert (tmp_path / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_measured_rows(capsys, monkeypatch, tmp_path):
    def in_this_process(workload, way, device, *, steps, threads):
        assert (steps, threads) == (2, 1)
        return measure_here(workload, way, device, steps=steps)

    monkeypatch.setattr(profiles, "measure", in_this_process)
    words = [*TINY, "--density", "0.1", "--ways", "attached", "--steps", "2", "--threads", "1"]
    assert main([*words, "--out", str(tmp_path), "--no-plot"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert "CPU allocator as recorded by torch.profiler; time: median of 2 steps." in lines[2]
    assert sum(" pred. " in line for line in lines) == 1
    assert sum(" meas. " in line for line in lines) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]
    [row] = json.loads((tmp_path / "profile.json").read_text())["rows"]
    assert row["measured"]["peak"] > 0
    assert row["error"] == pytest.approx(row["predicted"]["peak"] / row["measured"]["peak"] - 1)
    assert abs(row["error"]) < 0.1
    assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"]["median"])


def test_json_instead_of_the_table(capsys, tmp_path):
    words = [*TINY, "--density", "0.5", "--ways", "attached", "--predict-only", "--json"]
    assert main([*words, "-"]) == OK
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"][0]["not_measured"] == "predictions only were asked for"
    file = tmp_path / "deeper" / "profile.json"
    assert main([*words, str(file)]) == OK
    assert json.loads(file.read_text())["rows"] == printed["rows"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--density", "0"], "density=0.0"),
        (["--density", "1.01"], "density=1.01"),
        (["--density", "much"], "invalid float"),
        (["--model", "xlmr-bsae"], "xlmr-base"),
        (["--model", "/no/such/place"], "no such folder"),
        (["--model", "encoder:2x0x10"], "wanted at least 1 layer"),
        (["--dtype", "fp8"], "'fp32', 'bf16', 'fp16'"),
        (["--optimizer", "adam"], "'adamw'"),
        (["--task", "translation"], "'seq2seq'"),
        (["--task", "seq2seq"], "has no seq2seq task"),
        (["--ways", "attached,denes"], "'dense'"),
        (["--ways", ","], "no way to train"),
        (["--base", "3bit"], "'4bit'"),
        (["--fits", "lots"], "'lots' is no number of bytes"),
        (["--batch", "0"], "batch=0"),
        (["--length", "-1"], "length=-1"),
        (["--length", "4096"], "length=4096 is over the 512 positions"),
        (["--world-size", "0"], "at least one rank"),
        (["--world-size", "2", "--sharding", "dpp"], "mean 'ddp'"),
        (["--device", "gpu"], "'cpu' or 'cuda'"),
        (["--threads", "0"], "--threads 0"),
        (["--steps", "1"], "at least 2 steps"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_bad_input(words, said, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*TINY, *words]) == BAD_INPUT
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message


def test_cuda_on_a_machine_without(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*TINY, "--device", "cuda"]) == BAD_INPUT
    assert "--predict-only" in capsys.readouterr().err


@pytest.mark.slow
def test_each_way_in_a_process_of_its_own(capsys, real_encoder):
    words = ["--model", str(real_encoder), "--density", "0.01", "--batch", "4", "--length", "32"]
    assert main(["profile", *words, "--json", "-"]) == OK
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["way"]["kind"] for row in rows] == ["attached", "lora", "dense", "frozen"]
    assert all(abs(row["error"]) < 0.1 for row in rows)
    assert rows[0]["measured"]["peak"] < rows[2]["measured"]["peak"]
