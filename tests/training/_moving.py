"""A student, a teacher with some entries changed, and a start mask that has none of those."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sparseft.training import LoopTrainer


class Student(nn.Module):
    """What a teacher with some entries changed has to be found in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 32)
        self.scale = nn.Linear(32, 32)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return torch.cat([h, self.scale(h)], dim=-1)


def teacher_and_student(seed=0):
    """Return student, teacher, {name: positions that differ}, a start mask without any of them."""
    torch.manual_seed(seed)
    student, right, start = Student(), {}, {}
    teacher = copy.deepcopy(student)
    for name in ("layer.weight", "scale.weight"):
        weight = teacher.get_parameter(name).data.view(-1)
        order = torch.randperm(weight.numel())
        changed, others = order[:40], order[40:120]
        weight[changed] += torch.randn(40).sign() * 0.8
        right[name] = set(changed.tolist())
        start[name] = torch.zeros(weight.numel(), dtype=torch.bool)
        start[name][others] = True
        start[name] = start[name].view(teacher.get_parameter(name).shape)
    return student, teacher, right, start


class Pairs(torch.utils.data.Dataset):
    """Inputs and the teacher's outputs."""

    def __init__(self, teacher, rows=256):
        self.x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            self.y = teacher(self.x)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def collate(rows):
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def loop(model, teacher, folder, **options):
    defaults = {
        "steps": 30, "batch_size": 16, "lr": 1e-2, "collate": collate, "loss_fn": mse, "seed": 5,
    }  # fmt: skip
    return LoopTrainer(model, Pairs(teacher), output_dir=folder, **{**defaults, **options})


def bits(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items() if t.numel()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
