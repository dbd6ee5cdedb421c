"""Pre-train the demo's encoder: ``python -m sparseft.demo.pretrain --steps 9000 --work-dir WORK``.

Masked language modelling on the pre-training languages of `names`, one CPU thread by default. A run
that was interrupted goes on from its last checkpoint when the same command is given again, with the
same bits. At the end the assets are written with the record of what made them.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from sparseft.demo.corpus import BLOCK, MIXTURE, Corpus, MaskedBatch, mask_batch
from sparseft.demo.encoder import (
    ASSETS,
    CONFIG,
    PROVENANCE,
    TOKENIZER,
    WEIGHTS,
    encoder_config,
    file_digest,
    save_encoder,
    set_dropout,
)
from sparseft.demo.names import (
    DEV,
    SHOWN,
    SOURCE,
    babel_version,
    names,
    names_digest,
    pretraining_locales,
)
from sparseft.demo.tokenizer import BOS_ID, EOS_ID, train_tokenizer
from sparseft.errors import NonFiniteLossError

logger = logging.getLogger(__name__)
LOG_EVERY = 100


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(prog="python -m sparseft.demo.pretrain", description=__doc__)
    parser.add_argument("--steps", type=int, default=9000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=128, help="sequences a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=float, default=0.04, help="part of the steps that warm up")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--mask-rate", type=float, default=0.3)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=500)
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="checkpoints; resumed from if present"
    )
    parser.add_argument("--output", type=Path, default=ASSETS, help="where the assets are written")
    parser.add_argument("--stop-after", type=int, help="stop at this step, with a checkpoint")
    parser.add_argument("--locales", nargs="*", help="pre-train on these only (for trials)")
    return parser


def learning_rate(step: int, *, steps: int, peak: float, warmup: float) -> float:
    """Return the rate of a step: a linear rise in the warm-up, then half a cosine down to zero."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def masked_lm_loss(model: Any, batch: MaskedBatch) -> torch.Tensor:
    """Return the mean cross-entropy at the masked positions, computing logits only there.

    The output projection is 8,000 wide and the rest of the network 192: logits for all positions
    would double the cost of a step.
    """
    encoder = model.base_model
    hidden = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
    at_masked = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
    return functional.cross_entropy(model.lm_head(at_masked), batch.targets)


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, locales: list[str], *, rate: float) -> float:
    """Return the loss on dev-split names (keys never trained on) of pre-training languages."""
    was_training = model.training
    model.eval()
    rng = np.random.default_rng(0)
    total, count = 0.0, 0
    for locale in locales:
        texts = list(names(locale, "dev").values())
        if not texts:
            continue
        ids = [
            [BOS_ID, *e.ids, EOS_ID]
            for e in tokenizer.encode_batch(texts, add_special_tokens=False)
        ]
        batch = mask_batch(ids, rate=rate, vocab_size=tokenizer.get_vocab_size(), rng=rng)
        total += float(masked_lm_loss(model, batch)) * len(batch.targets)
        count += len(batch.targets)
    model.train(was_training)
    return total / max(1, count)


def _tokenizer(args: argparse.Namespace, locales: tuple[str, ...]) -> Any:
    """Return the run's tokenizer: made once, kept beside the checkpoints."""
    from tokenizers import Tokenizer

    path = args.work_dir / TOKENIZER
    if not path.exists():
        train_tokenizer(locales, vocab_size=args.vocab_size, seed=args.seed).save(str(path))
    return Tokenizer.from_file(str(path))


def _save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def provenance(
    args: argparse.Namespace, locales: tuple[str, ...], **figures: Any
) -> dict[str, Any]:
    """Return what made the assets: command, versions, data digest, losses, digests of the files."""
    import tokenizers
    import transformers

    everything = sorted({*locales, *SHOWN, *DEV})
    arguments = {
        key: value
        for key, value in sorted(vars(args).items())
        if not isinstance(value, Path) and key != "stop_after"
    }
    return {
        "script": "python -m sparseft.demo.pretrain",
        "arguments": arguments,
        "mixture": MIXTURE,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "babel": babel_version(),
        },
        "data": {
            "names_digest": names_digest(everything),
            "names_digest_source_and_shown": names_digest([SOURCE, *SHOWN]),
            "source": SOURCE,
            "pretraining_locales": list(locales),
            "held_out_shown": list(SHOWN),
            "held_out_dev": list(DEV),
        },
        **figures,
        "files": {
            name: {
                "blake2b_128": file_digest(args.output / name),
                "bytes": (args.output / name).stat().st_size,
            }
            for name in (WEIGHTS, CONFIG, TOKENIZER)
        },
    }


def pretrain(args: argparse.Namespace) -> Any:
    """Pre-train, or go on with an interrupted run, and write the assets at the end.

    Args:
        args: the parsed command line.

    Returns:
        The model.
    """
    from transformers import XLMRobertaForMaskedLM

    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    locales = tuple(args.locales) if args.locales else pretraining_locales()
    tokenizer = _tokenizer(args, locales)
    corpus = Corpus.build(locales, tokenizer)
    logger.info(
        "%d languages, %s sequences",
        len(locales),
        {kind: sum(map(len, pool)) for kind, pool in corpus.lines.items()},
    )

    torch.manual_seed(args.seed)
    config = encoder_config(
        tokenizer.get_vocab_size(), hidden=args.hidden, layers=args.layers, heads=args.heads
    )
    model = XLMRobertaForMaskedLM(config).train()
    # a few epochs of a small model: it underfits, and noise would only slow it
    set_dropout(model, 0.0)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=args.lr,
        betas=(0.9, 0.98),
        weight_decay=args.weight_decay,
        fused=True,
    )
    checkpoint = args.work_dir / "checkpoint.pt"
    start, curve, spent = 0, [], 0.0
    schedule: list[dict[str, int]] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, curve, spent = state["step"], state["curve"], state["seconds"]
        schedule = state["schedule"]
        logger.info("resumed at step %d", start)

    if not schedule or schedule[-1]["steps"] != args.steps:
        # a run may be shortened or lengthened on the way; what was done is part of the record
        schedule.append({"from_step": start, "steps": args.steps})
    vocab_size = tokenizer.get_vocab_size()
    window, began = [], time.monotonic()
    last = min(args.steps, args.stop_after or args.steps)
    batches: list[list[list[int]]] = []
    for step in range(start, last):
        if not batches or step % BLOCK == 0:
            batches = corpus.block(args.seed, step // BLOCK, args.batch_size)
        rng = np.random.default_rng((args.seed, 1, step))
        batch = mask_batch(
            batches[step % BLOCK], rate=args.mask_rate, vocab_size=vocab_size, rng=rng
        )
        torch.manual_seed(args.seed * 1_000_003 + step)
        rate = learning_rate(step, steps=args.steps, peak=args.lr, warmup=args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = masked_lm_loss(model, batch)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {step}; lower --lr (now {args.lr}). "
                f"The last good state is in {checkpoint}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window.append(loss.item())
        done = step + 1
        if done % LOG_EVERY == 0 or done == last:
            seconds = spent + time.monotonic() - began
            logger.info("step %d loss %.4f lr %.2e %.0f s", done, np.mean(window), rate, seconds)
            window.clear()
        if done % args.checkpoint_every == 0 or done == last:
            if done % args.checkpoint_every == 0:
                dev = held_out_loss(model, tokenizer, list(locales[::10]), rate=args.mask_rate)
                curve.append({"step": done, "held_out_loss": round(dev, 4)})
                logger.info("step %d held-out loss %.4f", done, dev)
            _save_checkpoint(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                    "curve": curve,
                    "schedule": schedule,
                    "seconds": spent + time.monotonic() - began,
                },
            )
    if last == args.steps:
        seconds = spent + time.monotonic() - began
        _write_assets(args, model, tokenizer, locales, curve, schedule, seconds)
    return model


def _write_assets(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    locales: tuple[str, ...],
    curve: list[dict[str, float]],
    schedule: list[dict[str, int]],
    seconds: float,
) -> None:
    save_encoder(model, args.output)
    tokenizer.save(str(args.output / TOKENIZER))
    final = held_out_loss(model, tokenizer, list(locales), rate=args.mask_rate)
    record = provenance(
        args,
        locales,
        parameters=sum(p.numel() for p in model.parameters()),
        steps_done=args.steps,
        schedule=schedule,
        training_minutes=round(seconds / 60, 1),
        loss={
            "what": "masked-LM loss on names of the dev keys, which are never trained on: "
            "all pre-training languages (final), every tenth (curve)",
            "final": round(final, 4),
            "curve": curve,
        },
    )
    (args.output / PROVENANCE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    logger.info("wrote %s, held-out loss %.4f", args.output, final)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pretrain(build_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
