"""A stock transformers Trainer over the classifier without transformers, with masks attached."""

from __future__ import annotations

from sparseft import attach, select


def masked_trainer(tiny, rows, folder, *, attached=None, model=None, callbacks=None, **changes):
    """Return model, attachment, trainer: 6 steps of 4 rows, a checkpoint and a log each 2."""
    import transformers

    model = tiny.plain_classifier() if model is None else model
    masks = select(model, method="random", nnz=300, exclude=["norm.*", "classifier.*"])
    sparse = attach(model, masks, full_params=["classifier.*"], **(attached or {}))
    options = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2,
        "save_strategy": "steps", "logging_steps": 2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "label_names": ["labels"],
    }  # fmt: skip
    args = transformers.TrainingArguments(output_dir=str(folder), **{**options, **changes})
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks
    )
    return model, sparse, trainer
