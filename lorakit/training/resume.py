"""Resuming a run: which checkpoint it goes on from, and whether it may."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.manage import parameters_of_others
from lorakit.config.errors import LorakitError
from lorakit.config.objectives import LOSS_TYPES
from lorakit.config.training import TrainConfig
from lorakit.data.batching import Order
from lorakit.data.encode import PairExample
from lorakit.data.examples import Examples
from lorakit.files.local import as_path
from lorakit.models.decoder import Decoder
from lorakit.models.shards import beginnings
from lorakit.models.tokenizer import Tokenizer
from lorakit.training import state as run_state
from lorakit.training.adamw import AdamW
from lorakit.training.log import RunFiles, say
from lorakit.training.losses.reference import Reference
from lorakit.training.losses.teacher import Teacher, TopTokens
from lorakit.training.progress import Progress
from lorakit.training.trainable import TOKENS, Trained

# Settings that a resumed run shares with the one that made the checkpoint.
SAME_SETTINGS = (
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "packing",
    "group_by_length",
    "objective",
    "optim",
    "loraplus_lr_ratio",
)

# Settings that say which layers an adapter is on. Its files may say the same in other words: an
# adapter that was loaded by a regex or by whole names is saved with short names.
WHICH_LAYERS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "feedforward_modules",
    "modules_to_save",
)


def must_match(
    trained: Trained,
    tok: Tokenizer,
    examples: Examples,
    validation: Examples | None,
    config: TrainConfig,
) -> dict[str, Any]:
    """Return what a run that goes on from a checkpoint shares with the run that made it.

    The digests take all lengths of the rows but only a thousand of the rows, and only the first
    numbers of each frozen parameter.
    """
    names = [*SAME_SETTINGS, *(["max_seq_length"] if config.packing else [])]
    names += [config.objective] if config.objective in ("grpo", "distillation") else []
    settings = asdict(config)
    own = {
        **({"classifier": asdict(head)} if (head := trained.model.config.classifier) else {}),
        **({} if config.form is None else {"loss_type": config.form}),
        "data": _digest(examples),
        "validation data": None if validation is None else _digest(validation),
        "model": digest_of_frozen(trained.model),
    }
    return {name: settings[name] for name in names} | trained.same(tok) | own


def _digest(examples: Examples) -> str:
    found = blake2b(examples.lengths.tobytes(), digest_size=16)
    for i in range(0, len(examples), max(1, len(examples) // 1000)):
        example = examples[i]
        if isinstance(example, PairExample) and not example.margin:
            found.update(json.dumps(example[:2]).encode())  # as before there were margins
            continue
        found.update(json.dumps(example).encode())
    return found.hexdigest()


def digest_of_frozen(model: Decoder) -> str:
    """Return a digest of what is frozen in a model, but for the adapters that are not selected."""
    found = blake2b(digest_size=16)
    others = {id(p) for p in parameters_of_others(model)}
    every = {name: p for name, p in model.named_parameters() if id(p) not in others}
    frozen = {name: p for name, p in every.items() if not p.requires_grad}
    numbers = beginnings(list(frozen.values()), 16)
    for (name, p), first in zip(frozen.items(), numbers, strict=True):
        # the offset of double quantization was a scalar in 0.1.0, whose checkpoints go on
        shape = torch.Size() if name.endswith(".offset") else p.shape
        found.update(str((p.dtype, shape)).encode())
        found.update(str(first).encode())
    return found.hexdigest()


def checkpoint_to_resume(output_dir: Path, config: TrainConfig) -> run_state.Checkpoint | None:
    """Return the checkpoint that a run goes on from, or None if it starts from the beginning.

    Unfinished checkpoints are removed. Raises LorakitError if `config.resume` names no checkpoint,
    or if the checkpoints in `output_dir` would be taken for those of this run.
    """
    run_state.remove_unfinished(output_dir)
    found = run_state.checkpoints(output_dir)
    if config.resume is None:
        if found:
            raise LorakitError(
                f"train: {output_dir} holds checkpoints of an earlier run; set resume to auto to "
                "go on from the last one, or choose another output_dir"
            )
        return None
    if config.resume == "auto":
        return found[-1] if found else None
    path = as_path(config.resume).absolute()
    asked = [each for each in run_state.checkpoints(path.parent) if each.path == path]
    if not asked:
        raise LorakitError(f"train: resume: {path} is no checkpoint of a run")
    later = [each.path.name for each in found if each.step > asked[0].step]
    if later:  # they would be taken for newer than those that this run is going to write
        raise LorakitError(
            f"train: resume: {output_dir} holds later checkpoints ({', '.join(later)}); remove "
            "them, or choose another output_dir"
        )
    return asked[0]


def resume_from(
    checkpoint: run_state.Checkpoint,
    trained: Trained,
    optimizer: AdamW,
    same: Mapping[str, Any],
    order: Order,
) -> Progress:
    """Set what is trained and its optimizer as they were, and return how far the run had come.

    Raises LorakitError if this run cannot go on from the checkpoint, or it is damaged.
    """
    if checkpoint.step > order.total:
        raise LorakitError(
            f"train: resume: {checkpoint.path} is beyond the {order.total} steps of this run; "
            "raise max_steps"
        )
    values = run_state.read_values(checkpoint)
    before = {**_said_by_no_one(values["same"]), **values["same"]}
    if run_state.has_tensors_of(checkpoint.path, trained.model):
        same = in_words_of(before, same)
    said = {name: value for name, value in same.items() if name in before or name != TOKENS}
    run_state.check_same(checkpoint.path, before, said)
    try:
        progress = Progress(**values["progress"])
    except TypeError as error:
        raise LorakitError(
            f"train: resume: {checkpoint.path} is of another version of lorakit ({error})"
        ) from None
    run_state.restore(checkpoint, values, trained.restore, optimizer, trained.divided)
    say(f"resumed from {checkpoint.path}")
    return progress


def _said_by_no_one(same: Mapping[str, Any]) -> dict[str, Any]:
    """Return what checkpoints of 0.1.0 leave out, since there was no other order or form."""
    forms = LOSS_TYPES.get(same.get("objective", "sft"), ())
    return {"group_by_length": True, **({"loss_type": forms[0]} if forms else {})}


def in_words_of(saved: Mapping[str, Any], same: Mapping[str, Any]) -> dict[str, Any]:
    """Return `same` with the layers of the adapter named as in `saved`, where both are the same."""
    before = saved.get("adapter")
    if not isinstance(before, dict):
        return dict(same)
    words = {name: before[name] for name in WHICH_LAYERS if name in before}
    return {**same, "adapter": {**same["adapter"], **words}}


def reference_of_run(
    model: Decoder,
    config: TrainConfig,
    checkpoint: run_state.Checkpoint | None,
    source: Decoder | TopTokens | None = None,
) -> Reference | Teacher | None:
    """Return what the loss compares with: the model before the first step, or a teacher.

    The source of a teacher is another model, or a file. None stands for the model before the first
    step: that is the model as it is, or what the checkpoint holds that the run goes on from. The
    result is None if the objective has no reference, or the run was begun by lorakit 0.1.0. That
    compared with the model without its adapter, and the run ends as it began.

    Raises LorakitError if the checkpoint is damaged.
    """
    if config.distillation is None:
        return _before_the_first_step(model, checkpoint) if config.compares else None
    before = _before_the_first_step(model, checkpoint) if source is None else source
    assert before is not None  # which 0.1.0 had no teachers for
    return Teacher(config.distillation, before)


def _before_the_first_step(
    model: Decoder, checkpoint: run_state.Checkpoint | None
) -> Reference | None:
    reference = Reference(model)
    if checkpoint is not None:
        if not run_state.read_values(checkpoint).get("reference"):
            say("resumed with the reference of lorakit 0.1.0, the model without its adapter")
            return None
        run_state.restore_reference(checkpoint.path, reference.tensors)
    return reference


def end_with_the_best(
    trained: Trained, output_dir: Path, progress: Progress, log: RunFiles
) -> None:
    """Set what is trained as the best evaluation had it. If that is gone, the last one stays."""
    best = progress.best_step
    path = output_dir / f"checkpoint-{best}"
    if best == progress.step:
        return
    if best is None:
        log.say(f"the last {trained.what} stays: no evaluation had a finite loss")
        return
    if not path.exists():  # the disk was full, or the run came from another directory
        log.say(
            f"the last {trained.what} stays: the checkpoint of the best, step {best}, is not there"
        )
        return
    trained.restore(path)
    log.say(f"the {trained.what} is that of step {best}, the best evaluation")
