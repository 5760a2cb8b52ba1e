"""Benchmarks of lm-evaluation-harness, run by its own code on a lorakit model."""

from collections.abc import Sequence
from pathlib import Path

from lorakit.config.errors import LorakitError, check
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer


def evaluate_tasks(
    model: Decoder,
    tok: Tokenizer,
    tasks: str | Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    tasks_dir: str | Path | None = None,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness.

    The harness makes the prompts and computes the scores, and downloads the data of its own tasks.

    Args:
        model: The model, with or without an adapter.
        tok: The model's tokenizer.
        tasks: Names of tasks, such as hellaswag.
        num_fewshot: Number of examples in a prompt; None leaves it to the task.
        limit: Number of rows of each task to take; None takes all.
        batch_size: Texts in a batch.
        chat: Put prompts into the chat template.
        tasks_dir: A folder of YAML files of one's own tasks, which is read instead of the
            harness's.

    Returns:
        The numbers of each task by the harness's names, such as "acc,none" and "acc_stderr,none".

    Raises:
        LorakitError: lm-eval is not installed, there is no task of a name, or a task asks for
            something that lorakit does not have.
    """
    check(batch_size > 0, "evaluate_tasks: batch_size must be at least 1")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from lorakit.evaluation.harness import HarnessModel
    except ImportError as error:
        raise LorakitError(f"tasks need lm-eval ({error}); pip install 'lorakit[eval]'") from None
    folder = None if tasks_dir is None else str(as_path(tasks_dir))
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    for name in names:
        if not manager.match_tasks([name]):
            raise LorakitError(f"there is no task {name!r} in {folder or 'lm-eval'}")
    found = simple_evaluate(
        model=HarnessModel(model, tok, batch_size),
        tasks=names,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    return {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
