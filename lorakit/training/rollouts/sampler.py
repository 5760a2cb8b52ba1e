"""Completions of prompts, sampled by the model in training.

The engine continues all of them together. The completions of a prompt share its keys and values,
which are computed once. What a completion draws follows from the seed, the step, the row and its
number among the completions of the row, so a resumed run samples the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lorakit.adapters.manage import selected_adapter
from lorakit.config.errors import LorakitError
from lorakit.config.grpo import GrpoConfig
from lorakit.config.training import TrainConfig
from lorakit.data.encode import IGNORE, Example
from lorakit.inference.engine import Engine
from lorakit.inference.request import Request
from lorakit.inference.sampling import Sampling
from lorakit.models.decoder import Decoder
from lorakit.models.tokenizer import Tokenizer
from lorakit.training.draws import seed_of_completion
from lorakit.training.mode import evaluation_mode

SLOTS = 64
"""Most completions that are continued at a time."""


def slots_of(config: TrainConfig) -> int:
    """Return how many completions the sampler of a run continues at a time."""
    return min(SLOTS, config.rows_of_step)


class Asked(NamedTuple):
    """A completion that is wanted: the number of its row, its own among them, and the prompt."""

    row: int
    number: int
    prompt: list[int]


class Completion(NamedTuple):
    """A completion: its tokens with the one that ended it, and their log-probabilities.

    `truncated` says that it has no end, since it came to max_completion_length.
    """

    tokens: list[int]
    logprobs: list[float]
    text: str
    truncated: bool


class Sampled(NamedTuple):
    """A completion of a prompt."""

    prompt: list[int]
    """The tokens of the prompt."""
    tokens: list[int]
    """The new tokens, with the one that ended them."""
    logprobs: list[float]
    """The log-probability of each new token, its logits divided by the temperature."""
    text: str
    """The new text."""
    truncated: bool
    """Whether it came to max_new_tokens without an end."""

    @property
    def example(self) -> Example:
        """Prompt and completion as `forward_backward` takes them; the completion is learned."""
        return Example(self.prompt + self.tokens, [IGNORE] * len(self.prompt) + self.tokens)


class Sampler:
    """Samples completions with the weights and the adapter that the model has at the moment.

    `longest` is the number of tokens of the longest prompt. Raises LorakitError if it leaves no
    room for a completion, the model has a learned prompt, or its weights are divided.
    """

    def __init__(self, model: Decoder, tok: Tokenizer, config: TrainConfig, longest: int):
        assert config.grpo is not None
        self.model, self.tok, self.seed = model, tok, config.seed
        self.settings: GrpoConfig = config.grpo
        self.capacity = longest + self.settings.max_completion_length
        self.slots = slots_of(config)
        self.engine: Engine | None = None  # made when it is needed first
        if self.capacity > model.config.context_length:
            raise LorakitError(
                f"grpo: a prompt of {longest} tokens and max_completion_length="
                f"{self.settings.max_completion_length} exceed the {model.config.context_length} "
                "positions of the model"
            )
        if model.beginning.length:
            raise LorakitError("grpo: an adapter that is a learned prompt cannot be sampled yet")
        if model.mesh is not None:
            raise LorakitError("grpo: weights that are divided cannot be sampled; set shard: none")

    def __call__(self, step: int, asked: Sequence[Asked]) -> list[Completion]:
        """Return a completion for each that is asked for, at a step of the run.

        Raises LorakitError if the model's logits are not finite.
        """
        with evaluation_mode(self.model):
            engine = self.engine or Engine(
                self.model, self.tok, slots=self.slots, capacity=self.capacity
            )
            self.engine = engine
            engine.forget()
            return answered(engine, [self._submit(engine, step, each) for each in asked])

    def _submit(self, engine: Engine, step: int, asked: Asked) -> Request:
        return engine.submit(
            asked.prompt,
            Sampling(self.settings.temperature, top_p=self.settings.top_p),
            max_new_tokens=self.settings.max_completion_length,
            adapter=selected_adapter(self.model),
            seed=seed_of_completion(self.seed, step, asked.row, asked.number),
            logprobs=0,
            logprobs_temperature=self.settings.temperature,
        )


def answered(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Return what an engine makes of requests. Raises LorakitError if one fails."""
    while not engine.idle:
        engine.step()
    return [_completion(request) for request in requests]


def _completion(request: Request) -> Completion:
    """Return what a request that is done has made. Raises LorakitError if it failed."""
    if request.error is not None:
        raise request.error
    tokens, logprobs = list(request.tokens), list(request.logprobs)
    if request.end_token is not None and request.end_logprob is not None:
        tokens.append(request.end_token)
        logprobs.append(request.end_logprob)
    return Completion(tokens, logprobs, request.text, request.finish_reason == "length")
