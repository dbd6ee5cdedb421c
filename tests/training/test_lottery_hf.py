"""lottery_ticket over stock Hugging Face Trainers, through public callbacks and options only."""

from __future__ import annotations

import ast
import functools
import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sparseft
from sparseft.errors import DataError, NonFiniteLossError, ResumeError
from sparseft.training import hooks as hooks_module
from sparseft.training import lottery_ticket
from sparseft.training.hooks import COMPLETE_MARKER, PhaseHooks, complete_checkpoints

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def make(tiny, rows):
    """``make(**TrainingArguments)`` -> a factory of stock Trainers with their default optimizer."""

    def factory(**options):
        extra = {
            k: options.pop(k) for k in ("callbacks", "train_dataset", "trainer") if k in options
        }
        on_phase = options.pop("on_phase", None)
        defaults = {
            "max_steps": 6,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
        }

        def make_trainer(model, phase):
            if on_phase is not None:
                on_phase(model, phase)
            arguments = transformers.TrainingArguments(
                output_dir=str(phase.output_dir), **{**defaults, **options}
            )
            return extra.get("trainer", transformers.Trainer)(
                model=model,
                args=arguments,
                train_dataset=extra.get("train_dataset", rows),
                eval_dataset=tiny.Rows(16, seed=9),
                callbacks=extra.get("callbacks"),
            )

        return make_trainer

    return factory


def run(make_trainer, model, folder, **options):
    defaults = {"nnz": 500, "exclude": ("*LayerNorm*",), "full_params": ("classifier.*",)}
    return lottery_ticket(make_trainer, model, output_dir=folder, **{**defaults, **options})


def test_a_stock_trainer_with_its_default_optimizer_trains_exactly_the_mask(tiny, make, tmp_path):
    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    names = []

    class Look(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            names.append(type(getattr(optimizer, "optimizer", optimizer)).__name__)
            ends.append({n: p.detach().clone() for n, p in model.named_parameters()})

    ends = []
    result = run(make(callbacks=[Look()], weight_decay=0.5), model, tmp_path)
    assert names == ["AdamW", "AdamW"]
    assert result.nnz == result.adapter.nnz == 500
    assert tiny.same_bits(before, tiny.bits(model))
    dense, sparse = ends
    assert any(not torch.equal(dense[n], before[n]) for n in dense)
    moved = 0
    for name, value in before.items():
        if name.startswith("classifier.") or name not in sparse:
            continue
        outside = (
            ~result.masks[name].to_mask()
            if name in result.masks
            else torch.ones_like(value, dtype=torch.bool)
        )
        assert torch.equal(sparse[name][outside], value[outside]), name
        moved += int((sparse[name] != value).sum())
    assert moved > 250
    composer = sparseft.Composer(model, {"t": result.adapter})
    composer.apply(["t"])
    assert all(torch.equal(p, sparse[n]) for n, p in model.named_parameters())
    composer.revert()
    assert {h["phase"] for h in result.history} == {
        "iteration-0/dense",
        "iteration-0/sparse-nnz-500",
    }


class Stop(Exception):
    pass


class StopAt(transformers.TrainerCallback):
    """Raises at the end of a step of one phase."""

    def __init__(self, phase_dir: str, step: int) -> None:
        self.phase_dir, self.step = phase_dir, step

    def on_step_end(self, args, state, control, **kwargs):
        if self.phase_dir in args.output_dir and state.global_step == self.step:
            raise Stop


@pytest.fixture(scope="module")
def undisturbed():
    """Tied or not -> the bytes of a run that nobody interrupts, made once."""
    return {}


@pytest.mark.parametrize(
    ("tied", "phase", "step"),
    [
        (False, "dense", 5),
        pytest.param(False, "sparse", 3, marks=pytest.mark.slow),  # another step of the next
        (False, "sparse", 5),
        (True, "sparse", 5),
        pytest.param(True, "dense", 5, marks=pytest.mark.slow),
        pytest.param(True, "sparse", 3, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_gives_the_same_bytes(
    tiny, make, tmp_path, undisturbed, phase, step, tied
):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}
    head = ("cls.predictions.transform.*", "cls.predictions.bias")  # not the tied decoder
    lm = {"exclude": head, "full_params": ()} if tied else {}

    class Tokens(tiny.Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "labels": row["input_ids"]}

    if tied:
        options["train_dataset"] = Tokens(20)
    model = tiny.tiny_masked_lm if tied else tiny.tiny_classifier
    if tied not in undisturbed:
        whole = run(make(**options), model(), tmp_path / "a", **lm)
        undisturbed[tied] = whole.path.read_bytes()
    with pytest.raises(Stop):
        run(make(callbacks=[StopAt(phase, step)], **options), model(), tmp_path / "b", **lm)
    torch.manual_seed(1234)
    resumed_from = []

    class Look(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            resumed_from.append((Path(args.output_dir).name.split("-")[0], state.global_step))

    again = run(make(callbacks=[Look()], **options), model(), tmp_path / "b", **lm)
    assert resumed_from[0] == (phase, step - 1)
    assert again.path.read_bytes() == undisturbed[tied]


def test_a_checkpoint_without_its_marker_is_removed_and_not_resumed(
    tiny, make, tmp_path, undisturbed
):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}
    if False not in undisturbed:
        whole = run(make(**options), tiny.tiny_classifier(), tmp_path / "a")
        undisturbed[False] = whole.path.read_bytes()
    with pytest.raises(Stop):
        run(make(callbacks=[StopAt("dense", 5)], **options), tiny.tiny_classifier(), tmp_path / "b")
    folder = tmp_path / "b" / "iteration-0" / "dense"
    assert [p.name for p in complete_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    (folder / "checkpoint-4" / COMPLETE_MARKER).unlink()
    (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    again = run(make(**options), tiny.tiny_classifier(), tmp_path / "b")
    assert again.path.read_bytes() == undisturbed[False]


def test_the_best_checkpoint_is_kept_in_both_phases(tiny, make, tmp_path):
    """A learning rate that diverges late: the last step is not the best one."""

    class Scores(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            best = Path(state.best_model_checkpoint).name
            ends.append((best, state.best_global_step, state.global_step))
            values.append({n: p.detach().clone() for n, p in model.named_parameters()})

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                early.append({n: p.detach().clone() for n, p in model.named_parameters()})

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_chosen"] = 1.0 if state.global_step == 2 else 0.0

    class Chosen(transformers.Trainer):
        """A Trainer whose metric is known beforehand (public method)."""

        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_chosen"] = 1.0 if self.state.global_step == 2 else 0.0
            return metrics

    ends, values, early = [], [], []
    result = run(
        make(
            callbacks=[Scores()],
            trainer=Chosen,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_chosen",
            greater_is_better=True,
        ),
        tiny.tiny_classifier(),
        tmp_path,
    )
    assert [e[0] for e in ends] == ["checkpoint-2", "checkpoint-2"]
    dense = sparseft.training.state.TensorFile(result.dense_path)
    assert all(torch.equal(dense[n], early[0][n]) for n in dense)
    model = tiny.tiny_classifier()
    sparseft.Composer(model, {"t": result.adapter}).apply(["t"])
    assert all(torch.equal(p, early[1][n]) for n, p in model.named_parameters())


def test_accumulation_and_l1_go_together(tiny, make, tmp_path):
    """The penalty enters once a step, however many micro-batches make it."""

    def size(**options):
        result = run(
            make(max_steps=8, max_grad_norm=0.0, **options),
            tiny.tiny_classifier(),
            tmp_path / str(len(list(tmp_path.iterdir()))),
            l1=(0.0, 2000.0),
            nnz=400,
        )
        return sum(float(d.values.abs().sum()) for d in result.adapter.values())

    one = size(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    four = size(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert four == pytest.approx(one, rel=0.35)


def test_a_nan_loss_stops_although_the_trainer_filters_it_from_its_log(tiny, make, tmp_path):
    class Poison(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if "sparse" in args.output_dir and state.global_step == 4:
                model.config.poison = True

    model = tiny.tiny_classifier()
    before = tiny.bits(model)
    forward = model.forward

    @functools.wraps(forward)  # the Trainer reads the signature to choose columns
    def poisoned(*args, **kwargs):
        out = forward(*args, **kwargs)
        if getattr(model.config, "poison", False):
            out.loss = out.loss * math.nan
        return out

    model.forward = poisoned
    with pytest.raises(NonFiniteLossError, match="at step 4 of the sparse phase") as caught:
        run(
            make(callbacks=[Poison()], save_strategy="steps", save_steps=2),
            model,
            tmp_path,
        )
    assert "sparse-nnz-500/checkpoint-4" in str(caught.value)
    assert tiny.same_bits(before, tiny.bits(model))
    folder = tmp_path / "iteration-0" / "sparse-nnz-500"
    kept = complete_checkpoints(folder)[-1]
    weights = sparseft.training.state.TensorFile(kept / "model.safetensors")
    assert all(torch.isfinite(weights[n]).all() for n in weights)


def test_a_trainer_that_writes_elsewhere_is_refused(tiny, make, tmp_path, rows):
    def elsewhere(model, phase):
        return transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path / "other"), report_to=[], use_cpu=True
            ),
            train_dataset=rows,
        )

    with pytest.raises(ValueError, match=r"output_dir=phase\.output_dir"):
        run(elsewhere, tiny.tiny_classifier(), tmp_path / "run")


def test_an_empty_data_set_and_changed_arguments_are_refused(tiny, make, tmp_path):
    with pytest.raises(DataError, match="train_dataset is empty"):
        run(make(train_dataset=tiny.Rows(0)), tiny.tiny_classifier(), tmp_path / "a")
    options = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(Stop):
        run(make(callbacks=[StopAt("dense", 3)], **options), tiny.tiny_classifier(), tmp_path / "b")
    with pytest.raises(ResumeError, match=r"learning_rate: was 0\.001, now 0\.002"):
        run(make(learning_rate=2e-3, **options), tiny.tiny_classifier(), tmp_path / "b")


def test_no_private_trainer_method_is_overridden():
    """The callback defines public events only, and nothing in sparseft subclasses a Trainer."""
    trainer = SimpleNamespace(accelerator=SimpleNamespace(scaler=None))
    callback = hooks_module._hf_callback(PhaseHooks("dense", [], 0.0), trainer)
    events = {n for n in vars(transformers.TrainerCallback) if not n.startswith("_")}
    own = {n for n in vars(type(callback)) if not n.startswith("_")}
    assert own <= events
    assert not any(
        hasattr(transformers.TrainerCallback, n) for n in vars(type(callback)) if n == "_check"
    )
    package = Path(inspect.getfile(sparseft)).parent
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                assert "Trainer" not in bases, f"{file}: {node.name}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.value.id == "trainer" and node.attr.startswith("_")
                assert not private, f"{file}:{node.lineno}: trainer.{node.attr}"


@pytest.mark.parametrize("already_unscaled", [False, True])
def test_l1_is_added_to_unscaled_gradients(already_unscaled):
    """With a loss scale the gradient is divided first, unless clipping has done it."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    weight.grad = torch.tensor([0.5, 0.5]) * (1.0 if already_unscaled else 1024.0)

    def unscale(optimizer):
        if already_unscaled:
            raise RuntimeError("unscale_() has already been called on this optimizer")
        weight.grad.div_(1024.0)

    accelerator = SimpleNamespace(
        scaler=SimpleNamespace(is_enabled=lambda: True), unscale_gradients=unscale
    )
    hooks = PhaseHooks("sparse", [(weight, weight.detach)], 4.0)
    callback = hooks_module._hf_callback(hooks, SimpleNamespace(accelerator=accelerator))
    args = SimpleNamespace(device=torch.device("cpu"), output_dir="x")
    callback.on_pre_optimizer_step(args, SimpleNamespace(global_step=0), None, optimizer=None)
    assert weight.grad.tolist() == [2.5, -1.5]
