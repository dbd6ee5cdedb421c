"""Ways to train: each trains what it says it does, on real tensors and on fake ones."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseft.errors import DataError, OptionError
from sparseft.profiling import Unavailable, Way, Workload, build, load_config
from sparseft.profiling.equal_count import equal_ranks
from sparseft.profiling.masks import exact_pattern
from sparseft.profiling.sizes import SIZES
from sparseft.profiling.trained import masked_names

WAYS = [
    Way("attached", 0.05),
    Way("attached", 0.05, "packed"),
    Way("dense"),
    Way("dense", None, "matrices"),
    Way("gradient_mask", 0.05),
    Way("lora", 0.05),
    Way("lora", 0.05, "fp32"),
    Way("shira", 0.05),
    Way("frozen"),
]
MODELS = [
    ("tiny-encoder", "mlm"),
    ("tiny-encoder", "classification"),
    ("tiny-decoder", "causal"),
    ("tiny-seq2seq", "seq2seq"),
]
# A head and a decoder; ties and two stacks take as long again.
FEWER = [
    MODELS[1],
    MODELS[2],
    pytest.param(*MODELS[0], marks=pytest.mark.slow),
    pytest.param(*MODELS[3], marks=pytest.mark.slow),
]


def small(model="tiny-encoder", task="auto", **options):
    return Workload(
        **({"batch": 2, "length": 8, "dropout": False} | options), model=model, task=task
    )


def snapshot(built):
    return {n: p.detach().clone() for n, p in built.model.named_parameters()}


@pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w.kind}{w.variant}")
@pytest.mark.parametrize(("model", "task"), FEWER, ids=lambda v: v)
def test_a_step_moves_what_is_trained_and_nothing_else(model, task, way):
    built = build(small(model, task), way, "cpu")
    before = snapshot(built)
    first, last = float(built.step()), float(built.step())
    changed = [n for n, p in built.model.named_parameters() if not torch.equal(p, before[n])]
    trained = {n for n, p in built.model.named_parameters() if p.requires_grad}
    if way.kind == "frozen":
        assert changed == []
        assert first == last
        return
    names = built.attachment.names if built.attachment else []
    weights = {built.model.get_parameter(name).data_ptr() for name in names}
    masked = {n for n, p in built.model.named_parameters() if p.data_ptr() in weights}
    assert set(changed) <= trained | masked
    assert len(changed) > len(masked)  # masked weights change through their leaves
    assert first != last
    assert built.trainable == (
        sum(int(m.sum()) for m in built.masks.values()) + built.head
        if built.masks
        else sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    )


@pytest.mark.parametrize(("model", "task"), FEWER, ids=lambda v: v)
@pytest.mark.parametrize("kind", ["attached", "dense", "gradient_mask", "lora", "frozen"])
def test_the_same_on_fake_tensors(model, task, kind):
    density = None if kind in ("dense", "frozen") else 0.05
    workload, way = small(model, task, dtype="bf16"), Way(kind, density)
    real = build(workload, way, "cpu")
    real.step()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = build(workload, way, "cpu")
        fake.step()
        assert fake.trainable == real.trainable
        theirs = {n: (p.shape, p.dtype) for n, p in real.model.named_parameters()}
        assert {n: (p.shape, p.dtype) for n, p in fake.model.named_parameters()} == theirs


def test_attached_and_gradient_mask_train_the_same_weights():
    for model, task in MODELS:
        workload = small(model, task)
        ours = build(workload, Way("attached", 0.1), "cpu")
        theirs = build(workload, Way("gradient_mask", 0.1), "cpu")
        for _ in range(3):
            ours.step()
            theirs.step()
        for name in theirs.masks:
            got, wanted = ours.model.get_parameter(name), theirs.model.get_parameter(name)
            torch.testing.assert_close(got, wanted, rtol=0, atol=5e-5)


def test_masks_keep_the_exact_count_on_every_matrix_and_no_head():
    built = build(small("tiny-encoder", "classification"), Way("attached", 0.05), "cpu")
    names = masked_names(built.model)
    assert built.attachment.names == names
    for name, pattern in built.attachment.patterns.items():
        assert pattern.nnz == max(1, round(0.05 * pattern.numel)), name
    assert not any(n.startswith("classifier") or n.endswith("bias") for n in names)
    assert {n.split(".")[0] for n in built.attachment.full_params} == {"classifier"}
    assert built.head == sum(p.numel() for p in built.attachment.full_params.values())
    tied = build(small("tiny-encoder", "mlm"), Way("attached", 0.05), "cpu")
    assert "lm_head.dense.weight" in tied.attachment.names  # pre-trained: masked, no head
    assert "lm_head.decoder.weight" not in tied.attachment.names
    assert tied.head == 0


@pytest.mark.parametrize("density", [0.03, 0.3, 1.0])
def test_counts_are_equal_to_one_percent_or_said(density):
    ours = build(small(), Way("attached", density), "cpu").trainable
    for kind in ("lora", "shira"):
        built = build(small(), Way(kind, density), "cpu")
        off = built.trainable / ours - 1
        assert abs(off) <= 0.01 or f"{off:+.1%}" in built.facts["count"]


def test_fewer_entries_than_one_rank_everywhere():
    built = build(small(), Way("lora", 0.005), "cpu")
    assert 0 < built.facts["adapted modules"] < 13
    assert built.facts["ranks"] == [1]
    assert "+12.8%" in built.facts["count"]  # 227 entries wanted, and pieces of 64 and 160


def test_adapters_start_from_the_base():
    with torch.no_grad():
        losses = [
            float(build(small(), way, "cpu").forward())
            for way in (Way("frozen"), Way("lora", 0.05), Way("shira", 0.05), Way("attached", 0.05))
        ]
    assert max(losses) - min(losses) < 1e-5


@pytest.mark.parametrize("count", [1, 7, 64, 100, 999, 12_345])
def test_ranks_come_near_and_lie_evenly(count):
    costs = {str(i): 64 if i % 3 else 160 for i in range(24)}
    ranks = equal_ranks(costs, count)
    assert max(ranks.values()) - min(ranks.values()) <= 1
    assert max(ranks.values()) >= 1
    got = sum(costs[name] * rank for name, rank in ranks.items())
    assert abs(got - count) <= 32 or got == 64
    if 200 <= count % sum(costs.values()) <= 2000:
        raised = [i for i, rank in enumerate(ranks.values()) if rank == max(ranks.values())]
        assert raised[0] < 12 <= raised[-1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (130, 257), (40,), (1100, 1000)])
@pytest.mark.parametrize("density", [1e-4, 0.07, 0.5, 1.0])
def test_exact_patterns(shape, density, packed):
    pattern = exact_pattern(shape, density, device=torch.device("cpu"), packed=packed)
    type(pattern)(pattern.indices, pattern.shape)  # ascending, unique, in range
    assert pattern.nnz == max(1, round(density * pattern.numel))


def test_masks_are_spread_and_packed_ones_are_not():
    one = exact_pattern((1024, 1024), 0.01, device=torch.device("cpu"))
    rows = (one.indices // 1024).bincount(minlength=1024)
    assert rows.max() < 40  # 10 on average
    other = exact_pattern((1024, 1024), 0.01, device=torch.device("cpu"), seed=1)
    assert not one.equals(other)

    def tiles(pattern):
        row, column = pattern.indices // 1024 // 128, pattern.indices % 1024 // 128
        return len(set(zip(row.tolist(), column.tolist(), strict=True)))

    assert tiles(one) == 64
    packed = exact_pattern((1024, 1024), 0.01, device=torch.device("cpu"), packed=True)
    assert tiles(packed) == 6


def test_the_same_entries_whatever_was_drawn_before():
    first = build(small(), Way("attached", 0.05), "cpu")
    torch.rand(10)
    state = torch.get_rng_state()
    second = build(small(), Way("gradient_mask", 0.05), "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    for name, mask in second.masks.items():
        assert torch.equal(first.attachment.patterns[name].to_mask(), mask.bool())
        assert torch.equal(first.model.get_parameter(name), second.model.get_parameter(name))
    assert all(torch.equal(first.inputs[k], second.inputs[k]) for k in first.inputs)


def test_checkpointing_changes_no_loss():
    for kind in ("attached", "lora", "frozen"):
        way = Way(kind, None if kind == "frozen" else 0.05)
        losses = [
            [float(built.step()) for _ in range(2)]
            for built in (build(small(checkpointing=c), way, "cpu") for c in (False, True))
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)
        assert build(small(checkpointing=True), way, "cpu").model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("optimizer", "ours", "theirs"),
    [
        ("adamw", "AdamW", "AdamW"),
        ("adamw_torch", "AdamW", "AdamW"),
        ("sparse_adamw", "SparseAdamW", "AdamW"),
        ("sgd", "SGD", "SGD"),
    ],
)
def test_optimizers(optimizer, ours, theirs):
    workload = small(optimizer=optimizer)
    first = build(workload, Way("attached", 0.05), "cpu")
    second = build(workload, Way("lora", 0.05), "cpu")
    assert (type(first.optimizer).__name__, type(second.optimizer).__name__) == (ours, theirs)
    if theirs == "AdamW":
        assert second.optimizer.defaults["fused"] is (None if optimizer == "adamw_torch" else True)


def test_moments_of_a_byte():
    built = build(small(optimizer="adamw_8bit"), Way("attached", 0.05), "cpu")
    built.step()
    state = next(iter(built.optimizer.state.values()))
    assert state["exp_avg_code"].element_size() == 1
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(Unavailable, match="bitsandbytes is not installed"):
            build(small(optimizer="adamw_8bit"), Way("dense"), "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        build(small(optimizer="adamw_8bit"), Way("dense"), "cpu").step()


def test_weights_of_a_folder_are_loaded(tmp_path):
    stock = build(small("tiny-encoder", "mlm"), Way("dense"), "cpu").model
    with torch.no_grad():
        stock.get_input_embeddings().weight.fill_(0.5)
    stock.save_pretrained(tmp_path)
    workload = small(str(tmp_path), seed=5)
    built = build(workload, Way("dense"), "cpu")
    assert bool((built.model.get_input_embeddings().weight == 0.5).all())
    assert built.inputs["labels"].shape == (2, 8)  # its architectures say: masked language model
    with FakeTensorMode(allow_non_fake_inputs=True):
        build(workload, Way("attached", 0.1), "cpu").step()
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    assert build(workload, Way("dense"), "cpu").model.get_input_embeddings().weight.std() < 0.1


def test_the_kind_of_task_that_a_config_means():
    wanted = {"tiny-encoder": "ForMaskedLM", "tiny-decoder": "ForCausalLM", "gpt2": "LMHeadModel"}
    wanted["tiny-seq2seq"] = "ForConditionalGeneration"
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model, ending in wanted.items():
            built = build(small(model), Way("frozen"), "cpu")
            assert type(built.model).__name__.endswith(ending)


def test_turned_weights_of_gpt2():
    with FakeTensorMode(allow_non_fake_inputs=True):
        ours = build(small("gpt2"), Way("attached", 0.01), "cpu")
        lora = build(small("gpt2"), Way("lora", 0.01), "cpu")
    assert abs(lora.trainable / ours.trainable - 1) < 0.01
    assert "transformer.h.0.attn.c_attn.weight" in ours.attachment.names


@pytest.mark.parametrize(
    ("name", "millions"),
    [("xlmr-base", 278), ("xlmr-large", 560), ("mbert", 178), ("bert-base", 110)]
    + [("roberta-base", 125), ("gpt2", 124)]
    # transformers 5 ties the output of every mT5, as its own checkpoints do not.
    + [("mt5-base", 390 if transformers.__version__ >= "5" else 582)]
    + [("7b", 6738), ("13b", 13016), ("30b", 32529)],
)
def test_sizes_are_those_of_the_published_models(name, millions):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(small(name), Way("frozen"), "cpu").model
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert name in SIZES


def test_any_shape():
    config = load_config("decoder:3x48x200")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (3, 48, 200)
    with pytest.raises(OptionError, match="LAYERSxHIDDENxVOCAB"):
        load_config("encoder:12x384")
    with pytest.raises(OptionError, match="multiple of 8"):
        load_config("encoder:12x383x100")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "mlmm"}, r"task 'mlmm' is not one of 'auto', 'mlm'.*mean 'mlm'"),
        ({"dtype": "fp8"}, r"dtype 'fp8' is not one of 'fp32', 'bf16', 'fp16'"),
        ({"base": "3bit"}, r"base '3bit' is not one of '', '4bit', '8bit'"),
        ({"optimizer": "adam"}, r"optimizer 'adam' is not one of 'adamw'"),
        ({"batch": 0}, r"batch=0; wanted a whole number of at least 1"),
        ({"length": -3}, r"length=-3"),
        ({"length": 2.5}, r"length=2.5"),
    ],
)
def test_bad_workloads(options, says):
    with pytest.raises(OptionError, match=says):
        Workload(model="tiny-encoder", **options)


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (("attach", 0.1), r"way to train 'attach' is not one of 'attached'"),
        (("attached",), r"density=None for attached; wanted a share in \(0, 1\]"),
        (("lora", 0.0), r"density=0.0 for lora"),
        (("shira", 1.01), r"density=1.01"),
        (("gradient_mask", float("nan")), r"density=nan"),
        (("dense", 0.1), r"dense has no density"),
        (("lora", 0.1, "packed"), r"variant of lora 'packed' is not one of '', 'fp32'"),
    ],
)
def test_bad_ways(way, says):
    with pytest.raises(OptionError, match=says):
        Way(*way)


def test_models_that_cannot_be_found(tmp_path, monkeypatch):
    def offline(name, load):
        raise ConnectionError("the hub does not answer")

    monkeypatch.setattr("sparseft.profiling.models.load_from_anywhere", offline)
    with pytest.raises(
        DataError, match=r"'xlmr-bas' is no folder.*does not answer.*'xlmr-base'.*path"
    ):
        load_config("xlmr-bas")
    with pytest.raises(DataError, match="no such folder"):
        load_config(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"no config.json"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_config(str(tmp_path))


def test_what_does_not_fit_the_model():
    with pytest.raises(OptionError, match=r"length=513 is over the 512 positions"):
        build(small(length=513), Way("frozen"), "cpu")
    build(small(length=512, batch=1), Way("frozen"), "cpu")
    build(small("tiny-seq2seq", length=600, batch=1), Way("frozen"), "cpu")  # relative positions
    with pytest.raises(OptionError, match=r"kind 'llama', which has no mlm task; it has causal"):
        build(small("tiny-decoder", "mlm"), Way("frozen"), "cpu")


def test_what_cannot_run_here(monkeypatch):
    with pytest.raises(Unavailable, match="predicted only"):
        build(small(base="4bit"), Way("lora", 0.1), "cpu")
    with FakeTensorMode(), pytest.raises(Unavailable, match="no backward on fake tensors"):
        build(small(), Way("shira", 0.1), "cpu")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else find(n))
    with pytest.raises(Unavailable, match="peft is not installed"):
        build(small(), Way("lora", 0.1), "cpu")


def test_dropout_as_in_the_config_or_none():
    def rates(dropout):
        model = build(small(dropout=dropout), Way("dense"), "cpu").model
        return {m.p for m in model.modules() if isinstance(m, nn.Dropout)}

    assert rates(True) == {0.1}
    assert rates(False) == {0.0}
