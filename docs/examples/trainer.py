"""Sparse fine-tuning in a stock transformers Trainer: best model, early stopping, resume.

python trainer.py                                         # seconds on a CPU
python trainer.py --stop-after 25; python trainer.py --resume     # the same bits
python trainer.py --model xlm-roberta-base --data train.tsv --lr 1e-4 --bf16
torchrun --nproc-per-node 2 trainer.py                    # on several GPUs, or CPU processes
"""

from __future__ import annotations

import numpy as np
import torch
import transformers
from task import StopAfter, accuracy, arguments, load

import sparseft

parser = arguments(__doc__)
parser.add_argument("--save-every", type=int, default=10)
parser.add_argument("--compact", action="store_true", help="checkpoints without frozen weights")
parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
args = parser.parse_args()

gpu = torch.cuda.is_available()
model, train, test, collate = load(args)

# Before the Trainer is made: it hands what requires a gradient to its optimizer, and that is then
# the chosen entries and the new head.
masks = sparseft.select(model, "random", density=args.density, exclude=["classifier.*"])
sparse = sparseft.attach(model, masks, full_params=["classifier.*"])
# The loss of a classifier is a mean: without this, transformers 5 adds micro-batches up.
model.accepts_loss_kwargs = False

trainer = transformers.Trainer(
    model=model,
    args=transformers.TrainingArguments(
        output_dir=str(args.out),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        bf16=args.bf16,
        eval_strategy="steps",
        eval_steps=args.save_every,
        save_steps=args.save_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        # Or a resumed run counts its patience from zero.
        restore_callback_states_from_checkpoint=True,
        logging_steps=args.save_every,
        report_to="none",  # "tensorboard", "wandb": the callback's numbers go there, too
        disable_tqdm=True,
        use_cpu=not gpu,  # without this, Trainer refuses bf16 on a CPU
        dataloader_pin_memory=gpu,
    ),
    train_dataset=train,
    eval_dataset=test,
    data_collator=collate,
    compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
    callbacks=[
        transformers.EarlyStoppingCallback(early_stopping_patience=3),
        StopAfter(args.stop_after),
    ],
)
# The adapter beside each checkpoint and, at the end, in the output folder; nnz, the diff's norm
# and the bytes of what trains in each log.
sparseft.SparseCallback(sparse, compact=args.compact).add_to(trainer)
trainer.train(resume_from_checkpoint=args.resume)  # the last checkpoint of the output folder

say = trainer.accelerator.print  # once, where several processes train
say(f"best step: {trainer.state.best_global_step} of {trainer.state.global_step}")
say(sparse, f"accuracy {accuracy(model, test, collate):.3f}")
sparse.detach(restore=True)  # the base again, bit for bit

# Anywhere else: a base that never saw the training, and the small file.
trainer.accelerator.wait_for_everyone()  # the first process writes it
fresh = load(args)[0].to(model.device)
with sparseft.Composer(fresh, {"task": args.out / "adapter"}).composed(["task"]):
    say(f"adapter on a fresh base: accuracy {accuracy(fresh, test, collate):.3f}")
