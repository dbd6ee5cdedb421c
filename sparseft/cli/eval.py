"""``sparseft eval``: scores of a recipe's adapters, or of any base with any adapters."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseft._text import did_you_mean
from sparseft.errors import DataError

if TYPE_CHECKING:
    from sparseft.adapter import Adapter
    from sparseft.data import Languages
    from sparseft.evaluation import Results

__all__ = ["HELP", "SETTINGS", "add_parser", "run"]

HELP = "score adapters on a multilingual task"

SETTINGS = ("base", "task", "task+language")

_DESCRIPTION = """\
Scores a classifier in several languages. Two forms:

  sparseft eval RECIPE [KEY=VALUE ...]     what `sparseft train RECIPE` trained (finished pieces are
                                           kept, missing scores are made, the report is rewritten)
  sparseft eval --base BASE --task TASK --data ROOT ...     any base, with any adapters"""

_EPILOG = """\
examples:
  sparseft eval recipe.yaml evaluation.batch_size=64
  sparseft eval --base finetuned/ --task xnli --data XNLI-1.0/ --languages sw ur
  sparseft eval --base xlm-roberta-base --task nusax_senti --data nusax/ \\
      --languages ban min --adapter task=sentiment/ ban=balinese/ min=minangkabau/ \\
      --setting task task+language --out scores/

adapters are given as NAME=PATH. One whose NAME is a language belongs to that language, any other to
the task. Settings:
  base            no adapter (a base that was fine-tuned whole)
  task            the task's adapters
  task+language   the task's adapters and the language's own, summed; needs one for each language

what comes out: a table, and with --out DIR results.json, results.md, results.png and, with
--predictions, one JSONL file for each setting and language."""


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "eval",
        help=HELP,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file or name of a recipe")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="values that replace the recipe's",
    )
    free = parser.add_argument_group("without a recipe")
    free.add_argument("--base", metavar="PATH", help="folder of the base, or its name on the hub")
    free.add_argument("--task", metavar="NAME", help=f"one of {', '.join(_task_files())}")
    free.add_argument(
        "--data",
        metavar="ROOT",
        help="folder with the task's files in their original layout; hf: or hf:NAME reads them "
        "through `datasets`",
    )
    free.add_argument(
        "--languages",
        nargs="+",
        metavar="LANG",
        help="codes, names or groups (default: all that the data has)",
    )
    free.add_argument("--adapter", nargs="+", default=[], metavar="NAME=PATH", help="adapters")
    free.add_argument(
        "--coeff",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help="coefficient of an adapter (default: 1)",
    )
    free.add_argument(
        "--setting",
        nargs="+",
        choices=SETTINGS,
        help="what to score (default: every setting that the adapters allow)",
    )
    free.add_argument("--source", metavar="LANG", help="source language (default: the task's own)")
    free.add_argument("--split", default="test", help="data split (default: %(default)s)")
    free.add_argument("--batch-size", type=_positive, default=32, metavar="N")
    free.add_argument("--max-length", type=_positive, default=128, metavar="N")
    free.add_argument(
        "--limit", type=_positive, metavar="N", help="score the first N examples only"
    )
    free.add_argument("--seed", type=int, default=0, help="seed of the run, noted in the results")
    free.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)"
    )
    free.add_argument(
        "--language-file", type=Path, metavar="YAML", help="your own languages and groups"
    )
    free.add_argument("--out", type=Path, metavar="DIR", help="write the report there")
    free.add_argument(
        "--predictions", action="store_true", help="with --out: write every prediction too"
    )


def _task_files() -> list[str]:
    # The names without importing the tasks, so that --help stays quick.
    folder = Path(__file__).resolve().parents[1] / "evaluation" / "tasks"
    return sorted(f.stem for f in folder.glob("*.py") if not f.stem.startswith("_"))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Score, print the table, write the report."""
    from sparseft.cli._output import quiet_transformers

    quiet_transformers()
    if args.recipe is not None:
        return _run_recipe(args)
    for name in ("base", "task", "data"):
        if getattr(args, name) is None:
            raise DataError(
                f"--{name} is missing. Give a RECIPE, or --base, --task and --data together."
            )
    if args.predictions and args.out is None:
        raise DataError("--predictions needs --out DIR to write to.")
    results = _score(args)
    for metric in results.metrics:
        _show(results, metric, f"{args.task}, {args.split}")
    if args.out is not None:
        for path in results.save(args.out):
            print(f"wrote {path}")
    return 0


def _run_recipe(args: argparse.Namespace) -> int:
    from sparseft.cli._recipe import check_inputs, read_recipe
    from sparseft.training.study import run_study, study_units

    recipe = read_recipe(args.recipe, args.overrides)
    if recipe.task is None or not recipe.evaluation.languages:
        raise DataError(
            f"recipe {recipe.name!r} has nothing to score: it needs a task and "
            "evaluation.languages."
        )
    check_inputs(recipe, study_units(recipe))
    study = run_study(recipe, only=("evaluate-*",), progress=True)
    if study.results is None:
        raise DataError(
            f"no scores in {study.output_dir}. Train first: sparseft train {args.recipe}"
        )
    title = f"{recipe.task.name}, {recipe.evaluation.split}"
    _show(study.results, recipe.evaluation.metric, title)
    for path in study.files:
        print(f"wrote {path}")
    if study.missing:
        print(f"not there yet: {', '.join(study.missing)} (sparseft train {args.recipe})")
    return 0


def _show(results: Results, metric: str, title: str) -> None:
    from sparseft.cli._output import print_table
    from sparseft.evaluation.markdown import gain_text, summary_table

    header, rows = summary_table(results, metric)
    print_table(header, rows, title=f"{title}: {metric} x 100")
    for density, gain in results.composed_gains(metric):
        at = "" if density is None else f" at density {density:.4g}"
        print(f"{gain.setting} over {gain.baseline}{at}: {gain_text(gain)}")


def _pairs(words: list[str], option: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise DataError(f"{option} {word!r} is not NAME=VALUE, e.g. {option} ban=balinese/.")
        if name in out:
            raise DataError(f"{option} gives {name!r} twice; keep one.")
        out[name] = value
    return out


def _coefficients(words: list[str], adapters: dict[str, str]) -> dict[str, float]:
    out = dict.fromkeys(adapters, 1.0)
    for name, text in _pairs(words, "--coeff").items():
        if name not in adapters:
            raise DataError(
                f"--coeff names {name!r}, which is not among the adapters "
                f"({', '.join(adapters) or 'none'}).{did_you_mean(name, adapters)}"
            )
        try:
            out[name] = float(text)
        except ValueError:
            raise DataError(f"--coeff {name}={text}: not a number.") from None
    return out


def _language_adapters(adapters: dict[str, str], known: Languages) -> dict[str, str]:
    """Return code -> name of the adapters that are named as a language."""
    found: dict[str, str] = {}
    spellings = {s.casefold() for code in known.names for s in known.spellings(code)}
    for name in adapters:
        if name.casefold() in spellings:
            code = known.code(name)
            if code in found:
                raise DataError(f"adapters {found[code]!r} and {name!r} are both for {code}.")
            found[code] = name
    return found


def _score(args: argparse.Namespace) -> Results:
    import torch

    from sparseft.adapter import Adapter
    from sparseft.cli._output import progress
    from sparseft.cli._paths import need_adapters
    from sparseft.composition import Composer
    from sparseft.data import builtin_languages, load_languages
    from sparseft.evaluation import (
        Results,
        evaluate_classifier,
        get_task,
        load_model,
        load_tokenizer,
        provenance,
    )
    from sparseft.training.setups import device_named

    device = device_named(args.device, "--device")
    known = load_languages(args.language_file) if args.language_file else builtin_languages()
    task = get_task(args.task)
    adapters = _pairs(args.adapter, "--adapter")
    need_adapters(adapters.values())
    coeffs = _coefficients(args.coeff, adapters)
    by_language = _language_adapters(adapters, known)
    task_side = [name for name in adapters if name not in by_language.values()]
    languages = _wanted_languages(args, task, known)
    settings = args.setting or _possible_settings(task_side, by_language, languages)
    _check_settings(settings, task_side, by_language, languages)

    new: list[str] = []
    torch.manual_seed(args.seed)
    model = load_model(args.base, num_labels=len(task.labels), missing=new).to(device)
    tokenizer = load_tokenizer(args.base)
    loaded = {name: Adapter.load(path) for name, path in adapters.items()}
    composer = Composer(model, loaded)

    results = Results(
        source_language=_source(args, task, languages, known),
        title=f"{task.name}, {args.split}",
        provenance=provenance(
            base=Path(args.base).name,
            adapters={n: {"file": Path(p).name, "coeff": coeffs[n]} for n, p in adapters.items()},
        ),
    )
    with progress() as tick:
        for setting in settings:
            for code in languages:
                names = [] if setting == "base" else list(task_side)
                if setting == "task+language":
                    names.append(by_language[code])
                composer.switch({name: coeffs[name] for name in names})
                _check_head(new, {name: loaded[name] for name in names}, args.base)
                what = f"{setting} {code}"
                evaluation = evaluate_classifier(
                    model,
                    tokenizer,
                    task,
                    code,
                    args.split,
                    root=args.data,
                    batch_size=args.batch_size,
                    max_length=args.max_length,
                    limit=args.limit,
                    languages=known,
                    progress=lambda done, of, what=what: tick(what, done, of),  # type: ignore[misc]
                )
                for metric in dict.fromkeys((task.metric, *evaluation.metrics)):
                    results.add(
                        setting=setting.replace("+", " + "),
                        language=code,
                        seed=args.seed,
                        metric=metric,
                        value=evaluation[metric],
                        split=args.split,
                        task=task.name,
                        n=len(evaluation),
                    )
                if args.predictions:
                    args.out.mkdir(parents=True, exist_ok=True)
                    file = f"predictions-{setting.replace('+', '-')}-{code}.jsonl"
                    evaluation.write_jsonl(args.out / file)
    composer.revert()
    return results


def _wanted_languages(args: argparse.Namespace, task: Any, known: Languages) -> list[str]:
    from sparseft.evaluation.task import HUB_PREFIX

    if args.languages:
        return known.expand(args.languages)
    if str(args.data).startswith(HUB_PREFIX):
        raise DataError("give --languages: the hub is not asked which languages it has.")
    found: list[str] = task.languages(args.data, args.split)
    if not found:
        raise DataError(f"no {args.split} data of task {task.name} in {args.data}: {task.layout}.")
    return found


def _source(
    args: argparse.Namespace, task: Any, languages: list[str], known: Languages
) -> str | None:
    source = args.source or task.source_language
    return next((code for code in languages if known.same(code, source)), None)


def _possible_settings(
    task_side: list[str], by_language: dict[str, str], languages: list[str]
) -> list[str]:
    if not task_side and not by_language:
        return ["base"]
    whole = bool(by_language) and all(code in by_language for code in languages)
    return [*(["task"] if task_side else []), *(["task+language"] if whole else [])] or ["base"]


def _check_settings(
    settings: list[str], task_side: list[str], by_language: dict[str, str], languages: list[str]
) -> None:
    if "task" in settings and not task_side:
        raise DataError("--setting task needs an adapter of the task, e.g. --adapter task=PATH.")
    if "task+language" in settings:
        lacking = [code for code in languages if code not in by_language]
        if lacking:
            raise DataError(
                f"--setting task+language needs an adapter for {', '.join(lacking)}; there is one "
                f"for {', '.join(by_language) or 'no language'}. Give --adapter {lacking[0]}=PATH, "
                "or leave the language out."
            )


def _check_head(new: list[str], adapters: Mapping[str, Adapter], base: str) -> None:
    """Refuse to score a head that nobody trained: neither the base nor an adapter holds it."""
    trained = {name for a in adapters.values() for name in (*a.dense, *a)}
    untrained = [name for name in new if name not in trained]
    if untrained:
        raise DataError(
            f"{', '.join(untrained)} would be random: they are neither in the base {base} nor in "
            f"the adapters {', '.join(adapters) or '(none)'}. Add the task's adapter, or give a "
            "base that was fine-tuned on the task."
        )
