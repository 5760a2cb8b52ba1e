"""`Session`: the steps of training in your own hands, one call each.

    forward_backward(rows)    adds the gradients of a loss of rows
    optim_step(rate)          clips them, and lets AdamW take a step
    sample(prompts)           continues prompts with the weights of this moment
    save_state, load_state    write and read all that the next step depends on

These names are those of Tinker's primitives (thinkingmachines.ai/tinker). Losses, gradients,
optimizer and files are those of `train`: a session that is given the rows of a run, step by step,
ends with the bytes of its adapter. An adapter has its own optimizer, counts and gradients, so one
session trains several, also in one pass (together.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from lorakit.adapters.manage import (
    check_adapter,
    check_spans,
    require_selected,
    selected,
)
from lorakit.config.errors import LorakitError, check
from lorakit.config.objectives import Objective
from lorakit.config.training import TrainConfig
from lorakit.data.batching import in_order
from lorakit.data.encode import (
    AnyExample,
    Example,
    JudgedExample,
    LabelledExample,
    PairExample,
)
from lorakit.data.rows import RowSource
from lorakit.evaluation.evaluate import check_kind, encode_for
from lorakit.files.local import as_path
from lorakit.inference.engine import Engine
from lorakit.inference.generate import token_ids
from lorakit.inference.sampling import Sampling
from lorakit.models.chat_template import Messages
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.training.draws import seed_of_completion
from lorakit.training.learner import Learned, Learner, LossFunction, Stepped
from lorakit.training.losses.batch import row_logprobs
from lorakit.training.losses.classification import check_head
from lorakit.training.mode import evaluation_mode, training_mode
from lorakit.training.rollouts.sampler import SLOTS, Sampled, answered
from lorakit.training.together import check_together, together, tokens_of_passes

_DEFAULTS = TrainConfig()
_OF_OBJECTIVES = (
    "loss_type",
    "label_smoothing_factor",
    "z_loss",
    "simpo_gamma",
    "desirable_weight",
    "undesirable_weight",
    "center_rewards_coefficient",
)


class Session:
    """Trains adapters of a model by hand; see the module.

    Args:
        model: A model with adapters (see `attach`), in bfloat16 or float32.
        tok: The model's tokenizer.
        config: How rows are encoded and split into batches, the settings of the losses, and the
            defaults of `optim_step`. A call is a step's rows, whatever
            gradient_accumulation_steps says. None takes the defaults.

    Raises:
        LorakitError: No adapter is attached, the weights of the model are divided, or the config
            wants train: full or has objective grpo.
    """

    def __init__(self, model: Decoder, tok: Tokenizer, config: TrainConfig | None = None):
        config = config or TrainConfig()
        require_selected(model, "Session")
        check(model.mesh is None, "Session: the weights are divided among processes; use train")
        check(config.train == "adapter", "Session trains adapters; use train for train: full")
        _check_loss(config.objective)
        # a call is all of a step, whose micro-batches have as many rows as the config says
        rows = config.rows_at_a_time
        config = replace(config, per_device_train_batch_size=rows, gradient_accumulation_steps=1)
        self.model, self.tok, self.config = model, tok, config
        self._learners: dict[str, Learner] = {}
        self._engine: Engine | None = None

    # ---- learning ----

    def forward_backward(
        self,
        rows: RowSource | Sequence[AnyExample],
        loss: Objective | LossFunction | None = None,
        *,
        adapter: str | None = None,
    ) -> Learned:
        """Add the gradients of the mean loss of rows to those of an adapter.

        The gradients of several calls before a step are those of one call with all the rows: the
        mean is over the tokens, or rows, of all of them.

        Args:
            rows: Rows as `read_rows` takes them, or encoded ones: those of `encode_rows`, or the
                `example` of what `sample` returns. They are computed in this order,
                per_device_train_batch_size at a time, or packed.
            loss: An objective of `TrainConfig` but grpo and distillation, or a function
                f(logprobs, rows) -> loss [], called for each batch with the log-probabilities, fp32
                [n], of the tokens that are learned in each row, and the numbers of these rows.
                Losses of a function are added up. None takes the objective of the config. Another
                one has its default settings, but for beta, which is that of the config.
            adapter: The name of the adapter. None: the selected one.

        Returns:
            The loss and counts of this call.

        Raises:
            LorakitError: There is no such adapter, it is merged, the rows cannot be read or have
                nothing to learn, the loss does not go with them or with the gradients that wait, or
                a function returns no number that has a gradient.
        """
        name = self._name(adapter)
        with selected(self.model, name):
            learner = self._learner(name)
            function = None if loss is None or isinstance(loss, str) else loss
            config = self._config(loss)
            check_head(self.model, config)
            learner.check_loss("a function" if function else config.objective)
            examples = self._examples(rows, config)
            batches = in_order([len(each.input_ids) for each in examples], config)
            largest = max(sum(len(examples[i].input_ids) for i in rows) for rows in batches)
            with training_mode(self.model, config, largest):
                if function is None:
                    return learner.learn(examples, batches, config)
                return learner.learn_by(function, examples, batches, config)

    def forward_backward_many(
        self, rows: Mapping[str, RowSource | Sequence[AnyExample]]
    ) -> dict[str, Learned]:
        """Add the gradients of several adapters, each of the mean loss of its own rows, in one go.

        The rows of all are packed into one, which every frozen layer multiplies at once. An adapter
        gets the gradients that `forward_backward` with its rows gives it, to the rounding of fp32.
        Its rate, its count of steps and its clipping stay its own: call `optim_step` for each.

        Args:
            rows: The rows of each adapter by its name, as `forward_backward` takes them. Of each,
                per_device_train_batch_size rows are computed at a time.

        Returns:
            The loss and counts of each adapter, by its name.

        Raises:
            LorakitError: As in `forward_backward`; or the config has another objective than sft,
                dft, label smoothing, a z-loss, noise or float8, or an adapter more than low-rank
                updates.
        """
        check(len(rows) > 0, "forward_backward_many: there are no rows of any adapter")
        check_together(self.config)
        check_head(self.model, self.config)
        taken: dict[str, Sequence[AnyExample]] = {}
        check_spans(self.model, list(rows))
        for name in rows:
            self._learner(name).check_loss("sft")
            taken[name] = self._examples(rows[name], self.config)
        with training_mode(self.model, self.config, tokens_of_passes(taken, self.config)):
            return together(self.model, self._learners, taken, self.config)

    def logprobs(
        self,
        rows: RowSource | Sequence[AnyExample],
        *,
        adapter: str | None = None,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Return the log-probabilities of the tokens that rows with one answer would teach.

        Args:
            rows: As `forward_backward` takes them.
            adapter: The name of the adapter. None: the selected one.
            temperature: What divides the logits.

        Returns:
            The log-probabilities of each row's label tokens, in their order.

        Raises:
            LorakitError: There is no such adapter, or the rows cannot be read.
        """
        config = self._config_of("sft")
        examples, found = self._examples(rows, config), list[list[float]]()
        size = config.rows_at_a_time
        name = self._name(adapter)
        with selected(self.model, name), evaluation_mode(self.model), torch.no_grad():
            for start in range(0, len(examples), size):
                some = examples[start : start + size]
                found += [
                    each.tolist() for each in row_logprobs(self.model, some, config, temperature)
                ]
        return found

    def optim_step(
        self,
        learning_rate: float | None = None,
        *,
        adapter: str | None = None,
        weight_decay: float | None = None,
        adam_beta1: float | None = None,
        adam_beta2: float | None = None,
        adam_epsilon: float | None = None,
        max_grad_norm: float | None = None,
    ) -> Stepped:
        """Clip the gradients of an adapter, let AdamW take a step, and forget them.

        A step whose loss or gradients are not finite is not taken.

        Args:
            learning_rate: The learning rate of this step. None, here and below: that of the config.
            adapter: The name of the adapter. None: the selected one.
            weight_decay: As in `TrainConfig`, and so are those that follow.
            adam_beta1: The decay of the mean of gradients.
            adam_beta2: The decay of the mean of squared gradients.
            adam_epsilon: What is added to the divisor.
            max_grad_norm: What a longer gradient is shortened to.

        Returns:
            The number of the step, the norm of the gradients, and whether the step was taken.

        Raises:
            LorakitError: There is no such adapter, it has no gradients, or a number is out of its
                range.
        """
        given = {
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "adam_beta1": adam_beta1,
            "adam_beta2": adam_beta2,
            "adam_epsilon": adam_epsilon,
            "max_grad_norm": max_grad_norm,
        }
        settings: dict[str, Any] = {key: v for key, v in given.items() if v is not None}
        config = replace(self.config, **settings)
        name = self._name(adapter)
        learner = self._learners.get(name)
        if learner is None or not learner.losses:
            raise LorakitError(f"optim_step: adapter {name!r} has no gradients: forward_backward")
        return learner.step(config)

    # ---- sampling ----

    def sample(
        self,
        prompts: Sequence[str | Messages | list[int]],
        *,
        num_samples: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        adapter: str | None = None,
    ) -> list[list[Sampled]]:
        """Continue prompts with the weights that an adapter has at this moment.

        The completions of a prompt share its keys and values.

        Args:
            prompts: Each a text, a list of messages, or token ids.
            num_samples: How many completions each prompt gets.
            max_new_tokens: Most tokens that a completion gets.
            temperature: Divisor of the logits; 0 takes the likeliest token.
            top_k: Number of the likeliest tokens that may be drawn; None means all.
            top_p: Share of the probability that the tokens which may be drawn hold together.
            stop: A string, or several. A text ends before the first of them that it holds.
            seed: Seed of the draws; None takes torch's global generator.
            adapter: The name of the adapter. None: the selected one.

        Returns:
            The completions of each prompt, in the order of the prompts.

        Raises:
            LorakitError: There is no such adapter, it is a learned prompt, an option is out of its
                range, or a prompt leaves no room.
        """
        check(num_samples >= 1, "sample: num_samples must be at least 1")
        check(not isinstance(prompts, str), "sample: prompts is a list, and this is one text")
        name = self._name(adapter)
        encoded = [token_ids(self.tok, prompt) for prompt in prompts]
        if not encoded:
            return []
        sampling = Sampling(temperature, top_k, top_p)
        with selected(self.model, name), evaluation_mode(self.model):
            longest = max(map(len, encoded)) + max_new_tokens
            engine = self._engine_for(longest, len(encoded) * num_samples)
            requests = [
                engine.submit(
                    encoded[i],
                    sampling,
                    max_new_tokens=max_new_tokens,
                    adapter=name,
                    stop=stop,
                    seed=None if seed is None else seed_of_completion(seed, 0, i, n),
                    logprobs=0,
                    logprobs_temperature=temperature or 1.0,
                )
                for i, n in product(range(len(encoded)), range(num_samples))
            ]
            done = iter(answered(engine, requests))
        return [[Sampled(ids, *next(done)) for _ in range(num_samples)] for ids in encoded]

    def _engine_for(self, positions: int, rows: int) -> Engine:
        """Return an engine with room for rows of so many positions, which knows no old keys."""
        slots, engine = min(SLOTS, rows), self._engine
        if engine is None or engine.capacity < positions or engine.slots < slots:
            limit = self.model.config.context_length
            if positions > limit:
                raise LorakitError(
                    f"sample: a prompt and max_new_tokens come to {positions} positions, and the "
                    f"model has {limit}"
                )
            if engine is not None:
                positions, slots = max(positions, engine.capacity), max(slots, engine.slots)
            self._engine = engine = None  # before the next one takes its memory
            self._engine = engine = Engine(self.model, self.tok, slots=slots, capacity=positions)
        engine.forget()
        return engine

    # ---- states ----

    def save_state(self, path: str | Path, *, adapter: str | None = None) -> None:
        """Write all that the next step of an adapter depends on, whole or not at all.

        The directory holds the adapter as `save_adapter` writes it, and the state of its optimizer.
        A state that is there already is replaced.

        Args:
            path: The directory to write.
            adapter: The name of the adapter. None: the selected one.

        Raises:
            LorakitError: There is no such adapter, it has gradients that wait for a step, or `path`
                holds something else or cannot be written.
        """
        name = self._name(adapter)
        with selected(self.model, name):
            self._learner(name).save(as_path(path).absolute(), self.tok)

    def load_state(self, path: str | Path, *, adapter: str | None = None) -> None:
        """Go on from what `save_state` wrote, or from a checkpoint of `train`.

        Gradients that wait for a step are forgotten.

        Args:
            path: The directory of the state.
            adapter: The name of the adapter. None: the selected one.

        Raises:
            LorakitError: There is no such adapter, no such state, it is damaged, or that of another
                model, adapter or optimizer.
        """
        name = self._name(adapter)
        with selected(self.model, name):
            learner = Learner(self.model, self.config, name)
            learner.load(as_path(path).absolute(), self.tok)
            self._learners[name] = learner

    # ---- parts ----

    def _name(self, adapter: str | None) -> str:
        """Return the name of an adapter, None for the selected one; check that it is there."""
        if adapter is None:
            return require_selected(self.model, "Session")
        check_adapter(self.model, adapter, "Session")
        return adapter

    def _learner(self, name: str) -> Learner:
        """Return what trains the adapter."""
        learner = self._learners.get(name)
        if learner is None or not learner.trains_what_is_there():  # another one has its name now
            with selected(self.model, name):
                learner = self._learners[name] = Learner(self.model, self.config, name)
        return learner

    def _config(self, loss: Objective | LossFunction | None) -> TrainConfig:
        if loss is None:
            return self.config
        if not isinstance(loss, str):
            check(callable(loss), f"forward_backward: {loss!r} is no loss")
            return self._config_of("sft")
        _check_loss(loss)
        return self.config if loss == self.config.objective else self._config_of(loss)

    def _config_of(self, objective: Objective) -> TrainConfig:
        """Return the config with another objective, whose own settings are the defaults."""
        plain = {name: getattr(_DEFAULTS, name) for name in _OF_OBJECTIVES}
        return replace(self.config, objective=objective, **plain)

    def _examples(
        self, rows: RowSource | Sequence[AnyExample], config: TrainConfig
    ) -> Sequence[AnyExample]:
        if isinstance(rows, list | tuple) and all(map(_is_encoded, rows)):
            check(len(rows) > 0, "forward_backward: there are no rows")
            examples = cast(list[AnyExample], list(rows))
            largest = max(max(each.input_ids) for each in examples)
            self.tok.check_fits([largest], self.model.config.vocab_size)
            check_kind(examples, config, "the rows")
            return examples
        return encode_for(self.model, self.tok, cast(RowSource, rows), config)


def _is_encoded(row: object) -> bool:
    return isinstance(row, Example | PairExample | JudgedExample | LabelledExample)


def _check_loss(loss: str) -> None:
    """Raise LorakitError for the losses that need more than rows."""
    if loss == "distillation":
        raise LorakitError(
            "Session: distillation has a teacher, which lorakit.train computes with: use that, or "
            "give forward_backward a function"
        )
    if loss == "grpo":
        raise LorakitError(
            "Session: grpo learns from advantages: give forward_backward the completions of "
            "sample, and a function that calls lorakit.grpo_loss"
        )
