"""``sparseft compose`` and ``sparseft inspect``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from sparseft import Adapter, Composer, SparseDiff, compose_adapters
from sparseft._registry import Registered
from sparseft.adapter import AdapterMetadata
from sparseft.cli._options import parse_options
from sparseft.cli.main import BAD_INPUT, OK, main
from sparseft.errors import CompositionError
from sparseft.modules import fingerprint_model

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = "roberta.encoder.layer.0.output.dense.weight"


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    return tiny.save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """A language adapter that also changes the masked-LM head, a task adapter with a head."""
    from transformers import AutoModelForMaskedLM

    folder = tmp_path_factory.mktemp("adapters")
    model = AutoModelForMaskedLM.from_pretrained(base)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)

    def diffs(names):
        return {
            n: SparseDiff.from_dense(
                torch.randn(parameters[n].shape, generator=generator),
                torch.rand(parameters[n].shape, generator=generator) < 0.3,
            )
            for n in names
        }

    def metadata(names):
        return AdapterMetadata(
            base_name="tiny", fingerprint=fingerprint_model(model, names), method="test", seed=7
        )

    names = [OUTPUT, "lm_head.dense.weight"]
    Adapter(diffs(names), name="sw", metadata=metadata(names)).save(folder / "sw")
    heads = {
        "classifier.dense.weight": torch.eye(16),
        "classifier.dense.bias": torch.zeros(16),
        "classifier.out_proj.weight": torch.randn(3, 16, generator=generator),
        "classifier.out_proj.bias": torch.zeros(3),
    }
    task = Adapter(diffs([OUTPUT]), name="nli", dense=heads, metadata=metadata([OUTPUT]))
    task.save(folder / "nli")
    return folder


def weight(folder, name, kind="AutoModelForSequenceClassification"):
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder)
    return dict(model.named_parameters())[name].detach()


def test_checkpoint_through_python_m(base, adapters, tmp_path):
    """As a user types it, from another directory."""
    done = subprocess.run(
        [sys.executable, "-m", "sparseft", "compose", "--base", str(base),
         "--adapter", str(adapters / "sw"), str(adapters / "nli"),
         "--coeff", "0.5", "-1", "--out", "merged"],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == OK, done.stderr
    assert "merged: " in done.stdout
    assert "lm_head.dense.weight" in done.stderr, "what was left out is said"
    sw, nli = Adapter.load(adapters / "sw"), Adapter.load(adapters / "nli")
    before = weight(base, OUTPUT, "AutoModelForMaskedLM")
    # Canonical order: nli, then sw.
    wanted = before + (-nli[OUTPUT].to_dense() + 0.5 * sw[OUTPUT].to_dense())
    assert torch.equal(weight(tmp_path / "merged", OUTPUT), wanted)
    head = weight(tmp_path / "merged", "classifier.out_proj.weight")
    assert torch.equal(head, nli.dense["classifier.out_proj.weight"])
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tmp_path / "merged")
    recipe = json.loads((tmp_path / "merged" / "sparseft_composition.json").read_text())
    assert {a["name"]: a["coeff"] for a in recipe["adapters"]} == {"sw": 0.5, "nli": -1.0}


def test_merged_adapter(adapters, tmp_path, capsys):
    out = tmp_path / "both.safetensors"
    words = ["compose", "--adapter", str(adapters / "sw"), str(adapters / "nli"),
             "--out", str(out), "--name", "sw-nli"]  # fmt: skip
    assert main(words) == OK
    merged = Adapter.load(out)
    assert merged.name == "sw-nli"
    assert f"{merged.nnz:,} entries in 2 tensors, 4 dense" in capsys.readouterr().out
    assert main(words) == BAD_INPUT
    assert "exists already; add --overwrite" in capsys.readouterr().err
    before = out.read_bytes()
    assert main([*words, "--overwrite"]) == OK
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--coeff", "1"], "--coeff has 1 numbers for 2 adapters"),
        (["--coeff", "1", "nan"], "coefficient of 'nli' is nan"),
        (["--coeff", "1", "x"], "invalid float value"),
        (["--method", "liner"], "no composition method 'liner'. Did you mean 'linear'"),
        (["--architecture", "AutoModel"], "--architecture needs --base"),
        (["--missing", "auto"], "--missing needs --base"),
        (["--base", "./nothing", "--name", "x"], "--name is for a merged adapter"),
        (["--base", "./nothing"], "no folder ./nothing"),
        (["--option", "density"], "--option 'density' is no KEY=VALUE"),
        (["--option", "density=0.2"], "'linear' has no option 'density'; it has none"),
        (["--method", "ties", "--option", "density=x"], "'ties' wants a number there"),
        (["--method", "ties", "--option", "densty=1"], "Did you mean 'density'?"),
    ],
)
def test_bad_input(adapters, tmp_path, capsys, extra, message):
    out = tmp_path / "out"
    words = ["compose", "--adapter", str(adapters / "sw"), str(adapters / "nli"), "--out", str(out)]
    assert main([*words, *extra]) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("base_given", [True, False])
def test_options_reach_the_method(base, adapters, tmp_path, base_given, capsys):
    words = ["compose", "--adapter", str(adapters / "sw"), str(adapters / "nli"),
             "--method", "ties", "--option", "density=0.5"]  # fmt: skip
    parts = {"sw": Adapter.load(adapters / "sw"), "nli": Adapter.load(adapters / "nli")}
    out = tmp_path / ("merged" if base_given else "merged.safetensors")
    if not base_given:
        assert main([*words, "--out", str(out)]) == OK
        wanted = compose_adapters(list(parts.values()), method="ties", density=0.5)
        assert Adapter.load(out).equals(wanted)
        assert not wanted.equals(compose_adapters(list(parts.values()), method="ties", density=1.0))
        return
    assert main([*words, "--out", str(out), "--base", str(base)]) == OK
    assert "(ties density=0.5)" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    Composer(model, parts).apply(["sw", "nli"], method="ties", density=0.5)
    assert torch.equal(weight(out, OUTPUT), dict(model.named_parameters())[OUTPUT])
    recipe = json.loads((out / "sparseft_composition.json").read_text())
    assert recipe["method"] == "ties"
    assert recipe["options"] == {"density": 0.5, "vote": "sum", "mean": "count"}
    assert "| density | `0.5` |" in (out / "README.md").read_text()


def test_methods_are_listed(capsys):
    assert main(["compose", "--help-methods"]) == OK
    out = capsys.readouterr().out
    for text in ("linear\n", "ties\n", "density: a number", "options: none", "https://arxiv.org"):
        assert text in out


def probe(
    *, a: float, b: int = 3, c: bool = True, d: Literal["x", "y"] = "x", e: int | None = None,
    f: Sequence[float] = (), g: str = "",
):  # fmt: skip
    """Take every kind of option."""


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["a=0.5", "b=4"], {"a": 0.5, "b": 4}),
        (["c=no", "d=y"], {"c": False, "d": "y"}),
        (["e=none", "f=1,2.5"], {"e": None, "f": [1.0, 2.5]}),
        (["e=7", "g=a=b"], {"e": 7, "g": "a=b"}),
        (["un-known=1"], {"un_known": "1"}),
        (["b=1.5"], "'probe' wants an integer"),
        (["c=maybe"], "wants true or false"),
        (["d=z"], "wants x or y"),
        (["e=x"], "wants an integer or none"),
        (["f=1,x"], "wants a number, comma-separated"),
        (["a=1", "a=2"], "given twice"),
    ],
)
def test_options_have_the_types_of_the_signature(words, wanted):
    entry = Registered("probe", probe, "https://", {})
    if isinstance(wanted, dict):
        assert parse_options(words, entry) == wanted
        return
    with pytest.raises(CompositionError, match=wanted):
        parse_options(words, entry)


_TWICE = """
import sys
from sparseft.cli.main import main

words = ["compose", "--adapter", sys.argv[1], "--out"]
print(main([*words, "found", "--base", "some-org/cached"]))
print(main([*words, "lost", "--base", "some-org/nowhere"]))
"""


def test_a_hub_name_without_a_hub(base, adapters, tmp_path):
    """What was downloaded is used; for the rest one line, at once, instead of half a minute."""
    home = tmp_path / "home"
    cached = home / "hub" / "models--some-org--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, cached / "snapshots" / ("0" * 40))
    # Nobody listens on this port: refused at once, as on a machine without a network.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", _TWICE, str(adapters / "nli")],
        capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300,
    )  # fmt: skip
    assert done.stdout.split()[0] == str(Path("found")) + ":", done.stderr
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == [
        str(OK),
        str(BAD_INPUT),
    ]
    assert (tmp_path / "found" / "model.safetensors").is_file()
    assert (tmp_path / "found" / "tokenizer.json").is_file()
    assert not (tmp_path / "lost").exists()
    assert "Retry" not in done.stderr
    # Libraries that transformers imports where they are installed (torchao) talk there, too.
    [said] = [line for line in done.stderr.splitlines() if line.startswith("sparseft")]
    assert said.startswith("sparseft compose: base model 'some-org/nowhere' cannot be loaded")
    assert "neither a folder here nor in the cache of downloads" in said
    assert "give the path of a folder written by save_pretrained" in said


def test_another_base_is_refused(tiny, adapters, tmp_path, capsys):
    other = tiny.save_tiny(tmp_path / "other", seed=1)
    words = ["compose", "--base", str(other), "--adapter", str(adapters / "sw"),
             "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(words) == BAD_INPUT
    assert "made on another base (tiny)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--no-check-base"]) == OK


def test_adapters_of_two_bases(tiny, adapters, tmp_path, capsys):
    def head(name, base_name):
        meta = AdapterMetadata(base_name=base_name)
        Adapter({}, name=name, dense={f"{name}.bias": torch.zeros(3)}, metadata=meta).save(
            tmp_path / name
        )
        return str(tmp_path / name)

    words = ["compose", "--out", str(tmp_path / "both.safetensors"), "--adapter"]
    words += [str(adapters / "sw"), head("other", "gpt2")]
    assert main(words) == BAD_INPUT
    assert "'other' was made on 'gpt2' and 'sw' on 'tiny'" in capsys.readouterr().err
    assert not (tmp_path / "both.safetensors").exists()
    assert main([*words, "--no-check-base"]) == OK
    assert "other.bias" in Adapter.load(tmp_path / "both.safetensors").dense


@pytest.mark.parametrize("out", ["sw", "sw/adapter.safetensors", "link", "./up/../sw"])
@pytest.mark.parametrize("given", ["sw", "sw/adapter.safetensors"])
def test_an_adapter_that_is_read_is_not_replaced(
    adapters, tmp_path, capsys, monkeypatch, out, given
):
    shutil.copytree(adapters / "sw", tmp_path / "sw")
    (tmp_path / "link").symlink_to(tmp_path / "sw")
    (tmp_path / "up").mkdir()
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "sw" / "adapter.safetensors").read_bytes()
    words = ["compose", "--adapter", given, str(adapters / "nli"), "--out", out, "--overwrite"]
    assert main(words) == BAD_INPUT
    assert f"{given}, which is read, is or holds that file" in capsys.readouterr().err
    assert (tmp_path / "sw" / "adapter.safetensors").read_bytes() == before


def test_terminated_in_the_middle(base, adapters, tmp_path, monkeypatch, capsys):
    from sparseft.composition import checkpoint_stream

    monkeypatch.setattr(
        checkpoint_stream, "compose_into_", lambda *a: os.kill(os.getpid(), signal.SIGTERM)
    )
    words = ["compose", "--base", str(base), "--adapter", str(adapters / "sw")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 143
    assert "sparseft compose: terminated." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_had_is_bad_input(base, adapters, tmp_path, monkeypatch, capsys):
    """Base or adapter alike; and a slip in a path here asks no hub."""
    import huggingface_hub

    asked = []

    def offline(*args, **options):
        asked.append(args)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    words = ["compose", "--out", "out", "--adapter"]
    assert main([*words, "owner/no-such-adapter"]) == BAD_INPUT
    assert main([*words, str(adapters / "sw"), "--base", "owner/no-such-base"]) == BAD_INPUT
    assert len(asked) == 2
    capsys.readouterr()
    assert main([*words, str(adapters / "sw"), "--base", "models/tinny"]) == BAD_INPUT
    said = capsys.readouterr().err
    assert "base model: no folder models/tinny" in said
    assert "Did you mean 'tiny'?" in said
    assert main([*words, "models/tinny"]) == BAD_INPUT
    assert len(asked) == 2
    assert not (tmp_path / "out").exists()


def test_inspect(adapters, capsys):
    assert main(["inspect", str(adapters / "sw"), str(adapters / "nli")]) == OK
    out = capsys.readouterr().out
    sw, nli = Adapter.load(adapters / "sw"), Adapter.load(adapters / "nli")
    for text in (sw.digest, nli.digest, "tiny", OUTPUT, "lm_head.dense.weight", f"{sw.nnz:,}",
                 "classifier.out_proj.weight", "Jaccard", "seed         7"):  # fmt: skip
        assert text in out
    ours, theirs = set(sw[OUTPUT].indices.tolist()), set(nli[OUTPUT].indices.tolist())
    assert f"{len(ours & theirs) / len(ours | theirs):.4f}" in out


def test_inspect_json(adapters, capsys):
    assert main(["inspect", "--json", str(adapters / "sw"), str(adapters / "nli")]) == OK
    data = json.loads(capsys.readouterr().out)
    sw = Adapter.load(adapters / "sw")
    assert data["adapters"][0]["digest"] == sw.digest
    assert data["adapters"][0]["nnz"] == sw.nnz
    assert [t["name"] for t in data["adapters"][0]["tensors"]] == sw.names
    assert data["overlaps"][0]["common"] <= data["adapters"][1]["nnz"]


def test_inspect_without_rows(adapters, capsys):
    assert main(["inspect", "--no-tensors", str(adapters / "sw")]) == OK
    out = capsys.readouterr().out
    assert OUTPUT not in out
    assert "entries" in out
    assert "Jaccard" not in out


def test_inspect_says_what_is_wrong(adapters, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == BAD_INPUT
    assert "no adapter at" in capsys.readouterr().err
    data = bytearray((adapters / "sw" / "adapter.safetensors").read_bytes())
    data[-2] ^= 0x7F
    (tmp_path / "bad.safetensors").write_bytes(data)
    assert main(["inspect", str(tmp_path / "bad.safetensors")]) == BAD_INPUT
    assert "bad.safetensors" in capsys.readouterr().err
