"""Mixed precision in stock loops: transformers' Trainer and accelerate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparseft
from sparseft.ops._common import bits

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate remembers the precision of a process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


class Watched:
    """An attached tiny BERT, and the dtypes in which one of its layers ran."""

    def __init__(self, tiny, dtype: torch.dtype = torch.float32) -> None:
        self.model = tiny.tiny_classifier().to(dtype)
        generator = torch.Generator().manual_seed(0)
        self.base = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        masks = {
            name: torch.rand(p.shape, generator=generator) < 0.3
            for name, p in self.model.named_parameters()
            if p.dim() == 2 and not name.startswith("classifier")
        }
        self.sparse = sparseft.attach(self.model, masks, full_params=["classifier.*"])
        self.seen: set[torch.dtype] = set()
        layer = self.model.bert.encoder.layer[0].intermediate.dense
        layer.register_forward_hook(lambda module, x, y: self.seen.add(y.dtype))

    def check(self) -> None:
        """Frozen bits hold, masked weights moved to rn(base + leaf), leaves are fp32."""
        for name, base in self.base.items():
            now = self.model.get_parameter(name).detach()
            assert now.dtype == base.dtype
            if name in self.sparse.full_params:
                assert not torch.equal(now, base), name
                continue
            mask = torch.zeros(base.shape, dtype=torch.bool)
            if name in self.sparse.leaves:
                leaf, mask = self.sparse.leaves[name], self.sparse.patterns[name].to_mask()
                assert leaf.dtype == torch.float32
                assert leaf.detach().any()
                wanted = (base[mask].float() + leaf.detach()).to(base.dtype)
                assert torch.equal(now[mask], wanted), name
            assert torch.equal(bits(now[~mask]), bits(base[~mask])), name


def train(watched: Watched, rows, folder, optimizer=None, **options) -> None:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.01,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    transformers.Trainer(
        model=watched.model,
        args=arguments,
        train_dataset=rows,
        optimizers=(optimizer, None),
    ).train()


@pytest.mark.parametrize("own", [False, True], ids=["Trainer's optimizer", "SparseAdamW"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_trainer_under_autocast(precision, own, tiny, rows, tmp_path):
    watched = Watched(tiny)
    optimizer = sparseft.SparseAdamW(watched.sparse.parameters(), lr=1e-2) if own else None
    train(watched, rows, tmp_path, optimizer, **{precision: True})
    # accelerate has neither autocast nor scaler for fp16 on a CPU and runs it in fp32.
    assert watched.seen == {BF16 if precision == "bf16" else torch.float32}
    watched.check()


@pytest.mark.parametrize("own", [False, True], ids=["Trainer's optimizer", "SparseAdamW"])
def test_trainer_on_a_pure_bf16_model(own, tiny, rows, tmp_path):
    watched = Watched(tiny, BF16)
    optimizer = sparseft.SparseAdamW(watched.sparse.parameters(), lr=1e-2) if own else None
    train(watched, rows, tmp_path, optimizer, gradient_accumulation_steps=2)
    assert watched.seen == {BF16}
    watched.check()


def step_with(accelerator, model: nn.Module, optimizer, batch: dict[str, Tensor]) -> None:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["sparse", "fused", "loop"])
def test_accelerate_bf16(kind, tiny, rows):
    watched = Watched(tiny)
    optimizer = optimizer_of(kind, watched)
    accelerator = accelerate.Accelerator(
        mixed_precision="bf16", cpu=True, gradient_accumulation_steps=2
    )
    model, optimizer = accelerator.prepare(watched.model, optimizer)
    for step in range(4):
        step_with(accelerator, model, optimizer, batch_of(tiny, rows, step))
    assert watched.seen == {BF16}
    watched.check()


@pytest.mark.parametrize("kind", ["sparse", "fused", "loop"])
def test_accelerate_with_a_scaler(kind, tiny, rows):
    """Its fp16 path, which it leaves out on a CPU: the scaler is put in by hand."""
    watched = Watched(tiny)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model, optimizer = accelerator.prepare(watched.model, optimizer_of(kind, watched))
    for step in range(4):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch_of(tiny, rows, step)).loss
        accelerator.backward(loss * (float("inf") if step == 2 else 1.0))
        optimizer.step()
        optimizer.zero_grad()
        names = ("classifier.weight", "bert.encoder.layer.0.intermediate.dense.weight")
        moved = {n: not torch.equal(model.get_parameter(n), before[n]) for n in names}
        assert set(moved.values()) == {step != 2}, moved
    assert accelerator.scaler.get_scale() == 2.0**7
    assert watched.seen == {torch.float16}
    watched.check()


def optimizer_of(kind: str, watched: Watched) -> torch.optim.Optimizer:
    parameters = list(watched.sparse.parameters())
    if kind == "sparse":
        return sparseft.SparseAdamW(parameters, lr=1e-2)
    return torch.optim.AdamW(parameters, lr=1e-2, fused=kind == "fused")


def batch_of(tiny, rows, step: int) -> dict[str, Tensor]:
    return tiny.collate([rows[4 * step + i] for i in range(4)])


def test_the_plain_loop_refuses_fp16_for_it_has_no_scaler(tiny, rows, tmp_path):
    with pytest.raises(ValueError, match=r"float16.*torch\.bfloat16 or None.*GradScaler.*Trainer"):
        sparseft.training.LoopTrainer(
            Watched(tiny).model, rows, output_dir=tmp_path, steps=1, autocast=torch.float16
        )
