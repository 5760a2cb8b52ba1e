"""`lorakit evaluate`: the loss of rows, scores of what a model makes of them, and benchmarks."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import lorakit as lk
from lorakit.cli.arguments import (
    ADAPTED_TEMPLATE_HELP,
    ADAPTER_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    STORAGE,
    Verbs,
    chat_template,
    count,
    head_for,
    tokenizer_of,
)


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "evaluate",
        parents=[common],
        help="measure the loss of rows, score the model's own completions, or run benchmarks",
        description="Measure the loss and the perplexity of rows, or how often a model with a head "
        "for classes tells their labels. With --metrics the model also "
        "completes each row greedily, and each score is printed with its 95%% bootstrap interval. "
        "With --tasks lm-evaluation-harness runs its tasks; rows may then be left out.",
    )
    add = parser.add_argument
    add("model", help=MODEL_HELP)
    add("rows", type=Path, nargs="?", help="JSONL, JSON, CSV, TSV or Parquet file of rows")
    add("--adapter", type=Path, help=ADAPTER_HELP)
    add(
        "--metrics",
        type=_names,
        default=[],
        metavar="NAME,NAME",
        help="scores of the completions: accuracy, macro_f1, weighted_f1, exact_match, "
        "partial_match, entity_f1, rouge_l, bleu, chrf",
    )
    add("--batch-size", type=count, default=8, help="rows in a batch (default: 8)")
    add("--save", type=Path, metavar="FILE", help="JSONL file to write the completions to")
    add(
        "--compare",
        type=Path,
        metavar="FILE",
        help="completions of another model, from its --save: say whether the scores differ by "
        "more than chance",
    )
    _add_judge(parser)
    _add_tasks(parser)
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--format", help="format of the rows (default: what their fields say)")
    add("--max-seq-length", type=count, default=1024, help="most tokens of a row (default: 1024)")
    add(
        "--train-on",
        default="completion",
        help="tokens that the loss counts: completion (the default), last_turn or all",
    )
    add("--chat-template", help=ADAPTED_TEMPLATE_HELP)
    add("--quantize", choices=STORAGE, help="pack the weights of the model")
    add("--dtype", default="bfloat16", help=DTYPE_HELP)
    parser.set_defaults(run=evaluate, take_rest=_take_rows)


def _add_judge(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a judge."""
    add = parser.add_argument
    add(
        "--judge",
        metavar="URL",
        help="OpenAI-compatible endpoint whose model judges the completions beside those of "
        "--compare, such as http://localhost:8000/v1",
    )
    add("--judge-model", metavar="NAME", help="model that judges")
    add("--judge-calls", type=count, metavar="N", help="most requests to send to it")
    add(
        "--judge-key",
        default=os.environ.get("LORAKIT_JUDGE_KEY") or None,
        metavar="KEY",
        help="key of the endpoint (default: that of the variable LORAKIT_JUDGE_KEY)",
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of benchmarks."""
    add = parser.add_argument
    add(
        "--tasks",
        type=_names,
        default=[],
        metavar="NAME,NAME",
        help="tasks of lm-evaluation-harness, such as hellaswag",
    )
    add("--num-fewshot", type=count, metavar="N", help="examples in a prompt of a task")
    add("--limit", type=count, metavar="N", help="rows of each task to take (default: all)")
    add("--tasks-dir", type=Path, metavar="DIR", help="YAML files of tasks to read instead")
    add("--chat", action="store_true", help="put the prompts of tasks into the chat template")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _take_rows(args: argparse.Namespace, rest: list[str]) -> bool:
    """Take one argument after an option as the rows, if there are none yet."""
    if args.rows is None and rest:
        args.rows = Path(rest.pop(0))
    return not rest


def evaluate(args: argparse.Namespace) -> int:
    """Print the loss, the scores and the results of tasks, and return the exit code."""
    _check(args)
    other = None if args.compare is None else lk.read_completions(args.compare)
    adapter = None if args.adapter is None else lk.fetch_adapter(args.adapter)
    template = chat_template(args.chat_template, adapter)
    tok = lk.load_tokenizer(tokenizer_of(args.model, adapter), chat_template=template)
    options = {"max_seq_length": args.max_seq_length, "train_on": args.train_on}
    head = head_for(args.model, adapter)
    told = head or lk.read_classifier(args.model)  # what the model tells of rows with labels
    if told is not None:
        _check_head(args)
        if told.rewards:
            print(
                "lorakit: the head has one output and is taken for that of a reward model, which "
                "pairs score; --format classification scores it by rows with numbers",
                file=sys.stderr,
            )
        if args.format is None and not told.rewards:
            args.format = "classification"
    # The rows are encoded before the model is loaded: an error in them should not take minutes.
    examples = None
    if args.rows is not None:
        examples = lk.encode_rows(args.rows, tok, format=args.format, **options)
    model = lk.load_model(args.model, dtype=args.dtype, quantize=args.quantize, classifier=head)
    if adapter is not None:
        lk.load_adapter(model, adapter)
    result: dict[str, Any] = {}
    if examples is not None:
        result |= lk.evaluate(model, tok, examples, batch_size=args.batch_size, **options)
    if examples is not None and (args.metrics or args.judge):
        completions = lk.complete_rows(model, tok, examples, batch_size=args.batch_size)
        if args.save is not None:
            lk.write_completions(args.save, completions)
        result |= _scores(completions, args.metrics)
        if other is not None:
            _check_same_rows(other, completions, args.compare)
            result["compared"] = _compared(other, completions, args.metrics)
            if args.judge:
                result["judged"] = _judged(args, other, completions)
    if args.tasks:
        result["tasks"] = lk.evaluate_tasks(
            model,
            tok,
            args.tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            batch_size=args.batch_size,
            chat=args.chat,
            tasks_dir=args.tasks_dir,
        )
    print(json.dumps(result) if args.json else _table(result))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise LorakitError for arguments that do not go together."""
    if args.rows is None and not args.tasks:
        raise lk.LorakitError("there is nothing to evaluate: give a file of rows, or --tasks")
    if args.rows is None and (args.metrics or args.judge):
        raise lk.LorakitError("--metrics and --judge are about rows: give a file of rows")
    if (args.save or args.compare) and not (args.metrics or args.judge):
        raise lk.LorakitError("--save and --compare are about completions: give --metrics too")
    if args.judge and (args.compare is None or args.judge_model is None):
        raise lk.LorakitError(
            "--judge compares two models: give --compare, the other one's completions, and "
            "--judge-model, who judges"
        )
    if args.judge and not args.judge.startswith(("http://", "https://")):
        raise lk.LorakitError(f"--judge {args.judge}: it must begin with http:// or https://")
    if args.save is not None and args.save.is_dir():
        raise lk.LorakitError(f"--save {args.save} is a directory; name a file")
    for name, path in (("the rows", args.rows), ("--compare", args.compare)):
        if args.save is not None and path is not None and args.save.resolve() == path.resolve():
            raise lk.LorakitError(f"--save {args.save} would replace {name}; name another file")
    lk.metrics.check_usable(args.metrics)


def _check_head(args: argparse.Namespace) -> None:
    """Raise LorakitError for arguments about texts, which a head for classes writes none of."""
    for name in ("metrics", "judge", "tasks"):
        if getattr(args, name):
            raise lk.LorakitError(
                f"--{name} is about texts that a model writes, and this one tells classes: leave "
                "it out"
            )


def _scores(completions: list["lk.Completion"], metrics: list[str]) -> dict[str, "lk.Interval"]:
    predictions = [each.prediction for each in completions]
    references = [each.reference for each in completions]
    return {name: lk.bootstrap_interval(predictions, references, name) for name in metrics}


def _check_same_rows(other: list["lk.Completion"], ours: list["lk.Completion"], path: Path) -> None:
    """Raise LorakitError if two models have not answered the same rows."""
    if [each.reference for each in other] != [each.reference for each in ours]:
        raise lk.LorakitError(f"--compare {path}: it holds completions of other rows")


def _compared(
    other: list["lk.Completion"], ours: list["lk.Completion"], metrics: list[str]
) -> dict[str, "lk.Comparison"]:
    references = [each.reference for each in ours]
    first, second = ([each.prediction for each in completions] for completions in (other, ours))
    return {name: lk.compare_predictions(first, second, references, name) for name in metrics}


def _judged(
    args: argparse.Namespace, other: list["lk.Completion"], ours: list["lk.Completion"]
) -> dict[str, Any]:
    """Return how often a judge prefers our completions, and how often the other ones."""
    found = lk.judge_answers(
        [each.prompt for each in ours],
        [each.prediction for each in other],
        [each.prediction for each in ours],
        references=[each.reference for each in ours],
        endpoint=args.judge,
        judge=args.judge_model,
        api_key=args.judge_key,
        max_calls=args.judge_calls,
    )
    return {
        "win_rate": found.win_rate,
        "wins": found.count("second"),
        "losses": found.count("first"),
        "ties": found.count("tie"),
        "not_judged": found.count("none"),
        "p_value": found.p_value,
        "calls": found.calls,
    }


def _table(result: dict[str, Any]) -> str:
    """Return a line for each number, one for each comparison, and one for each number of a task."""
    lines = [
        f"{name:14} {value:.4f}" if isinstance(value, float) else f"{name:14} {value}"
        for name, value in result.items()
        if name not in ("compared", "judged", "tasks")
    ]
    lines += [f"{name:14} {each}" for name, each in result.get("compared", {}).items()]
    for name, value in result.get("judged", {}).items():
        shown = "of nothing" if value is None else f"{value:.4g}"
        lines.append(f"{'judged':14} {name:14} {shown}")
    for task, values in result.get("tasks", {}).items():
        lines += [f"{task:20} {name:24} {value:.4f}" for name, value in values.items()]
    return "\n".join(lines)
