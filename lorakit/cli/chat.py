"""`lorakit chat`: talk to a model in the terminal, through one adapter or another.

Each message renders the whole chat by the template and gives it to the engine, which takes over the
keys and values of what it has read before: a turn costs its new tokens. Another adapter reads the
chat once from its beginning.

Answers go to standard output, and all else to standard error. Where one of the ends is no terminal
there are no prompts: a line that comes in is a message, and what goes out are answers alone.
"""

import argparse
import contextlib
import random
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import lorakit as lk
from lorakit.cli.arguments import (
    ADAPTED_TEMPLATE_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    NAMED_ADAPTER_HELP,
    STORAGE,
    Verbs,
    add_sampling,
    chat_template,
    fetched_adapters,
    named_adapter,
    tokenizer_of,
)

_COMMANDS = """\
/adapter NAME   answer with this adapter; none is the model alone, no NAME lists them
/system TEXT    set the system prompt; none takes it away, no TEXT shows it
/retry          answer the last message again
/undo           forget the last message and its answer
/reset          begin a new chat
/help           show this list
/exit           end, as Ctrl-D does
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer."""


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "chat",
        parents=[common],
        help="talk to a model in the terminal",
        description="Talk to a model in the terminal. /help lists what else can be typed, such as "
        "/adapter, which changes the adapter within a chat. Messages may come from a pipe, one a "
        "line.",
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "--adapter",
        type=named_adapter,
        action="append",
        default=[],
        metavar="[NAME=]ADAPTER",
        help=f"{NAMED_ADAPTER_HELP}; the first one answers until /adapter names another",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--chat-template", help=ADAPTED_TEMPLATE_HELP)
    parser.add_argument("--quantize", choices=STORAGE, help="pack the weights of the model")
    parser.add_argument("--dtype", default="bfloat16", help=DTYPE_HELP)
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="stop an answer after this many tokens (default: as many as there is room for)",
    )
    add_sampling(parser)
    parser.set_defaults(run=chat)


def chat(args: argparse.Namespace) -> int:
    """Answer messages until there are no more, and return the exit code."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    talk = _Chat(args, interactive)
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # it gives `input` a history and keys to edit with
        _say(f"{args.model}; /help lists what can be typed")
    for text in _typed(interactive):
        command = re.fullmatch(r"/(\w+)(?:\s+(.*))?", text, re.DOTALL)
        try:
            if command is None:
                talk.answer(talk.messages, text)
            elif command[1] == "exit":
                break
            else:
                _obey(talk, command[1], command[2] or "")
        except lk.LorakitError as error:
            _say(f"lorakit: {error}")
    return 0


def _typed(interactive: bool) -> Iterator[str]:
    """Yield the messages and commands that are typed, none empty."""
    lines: list[str] = []
    try:
        while True:
            line = input(("... " if lines else "> ") if interactive else "")
            lines.append(line.removesuffix("\\"))
            if line.endswith("\\"):
                continue
            text = "\n".join(lines).strip()
            lines = []
            if text:
                yield text
    except (EOFError, KeyboardInterrupt) as end:
        text = "\n".join(lines).strip()
        if text and not interactive and isinstance(end, EOFError):
            yield text  # the last line of a pipe ended in \
        if not interactive and isinstance(end, KeyboardInterrupt):
            raise
        if interactive:
            print()


def _obey(talk: "_Chat", name: str, rest: str) -> None:
    """Carry out a command other than /exit."""
    match name:
        case "adapter" if rest:
            talk.change(rest if rest != "none" else None, talk.system)
        case "adapter":
            for each in talk.toks:
                _say(f"{'*' if each == talk.adapter else ' '} {each or 'none'}")
        case "system" if rest:
            talk.change(talk.adapter, rest if rest != "none" else None)
        case "system":
            _say(talk.system or "there is no system prompt")
        case "retry":
            talk.answer(talk.messages[:-2], talk.last_message())
        case "undo":
            talk.last_message()
            del talk.messages[-2:]
        case "reset":
            talk.messages = []
        case "help":
            _say(_COMMANDS)
        case _:
            raise lk.LorakitError(f"there is no command /{name}; /help lists those that there are")


def _say(text: str) -> None:
    """Print what is no answer."""
    print(text, file=sys.stderr, flush=True)


class _Chat:
    """A chat with a model: what was said, and who answers."""

    def __init__(self, args: argparse.Namespace, interactive: bool):
        self.args, self.interactive = args, interactive
        self.sampling = lk.Sampling(
            args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty
        )
        self.random = random.Random(args.seed)  # a seed for each answer: /retry draws again
        adapters = fetched_adapters(args.adapter)
        if "none" in adapters:
            raise lk.LorakitError("--adapter: /adapter none means no adapter; write NAME=ADAPTER")
        # each adapter is spoken to as it was trained, with the tokens and the template beside it
        self.toks = {
            name: lk.load_tokenizer(
                tokenizer_of(args.model, path),
                chat_template=chat_template(args.chat_template, path),
            )
            for name, path in [(None, None), *adapters.items()]
        }
        self.adapter = next(iter(adapters), None)
        self.system: str | None = None
        self.messages: list[dict[str, Any]] = []
        self._prompt([])  # a model without a template should not take minutes
        self.model = lk.load_model(args.model, dtype=args.dtype, quantize=args.quantize)
        for name, path in adapters.items():
            lk.load_adapter(self.model, path, name=name)
        # the tokenizer with most tokens knows them all
        self.engine = lk.Engine(self.model, max(self.toks.values(), key=len), slots=1)
        self.change(self.adapter, args.system)

    def change(self, adapter: str | None, system: str | None) -> None:
        """Take another adapter or system prompt, or raise LorakitError and stay as it was."""
        if adapter not in self.toks:
            names = ", ".join(name or "none" for name in self.toks)
            raise lk.LorakitError(f"there is no adapter {adapter!r}; there are {names}")
        before = self.adapter, self.system
        self.adapter, self.system = adapter, system
        try:
            if adapter is not None and any(self.model.config.moe_layers or ()):
                lk.set_adapter(self.model, adapter)  # experts take no other one
            self._submit(self.messages).cancel()
        except lk.LorakitError:
            self.adapter, self.system = before
            raise

    def last_message(self) -> str:
        """Return the last message that was answered; raise LorakitError if there is none."""
        if not self.messages:
            raise lk.LorakitError("nothing has been answered yet")
        return self.messages[-2]["content"]

    def answer(self, before: list[dict[str, Any]], text: str) -> None:
        """Print the answer to a message that follows those before, and keep both.

        Raises LorakitError if there is no room or no answer; the chat is then as it was.
        """
        messages = [*before, {"role": "user", "content": text}]
        request = self._submit(messages)
        with _stoppable(request) if self.interactive else contextlib.nullcontext():
            while not request.done:
                for event in self.engine.step():
                    print(event.text, end="", flush=True)
        print(flush=True)
        if request.error is not None:
            raise request.error
        if request.text:
            self.messages = [*messages, {"role": "assistant", "content": request.text}]
        if len(request.tokens) == self.args.max_new_tokens:
            _say("(the answer ends at --max-new-tokens)")
        elif request.finish_reason == "length":
            _say("(there is no room for more; /reset begins a new chat)")

    def _prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of a chat, up to where its answer begins."""
        tok = self.toks[self.adapter]
        if tok.chat_template is None:
            raise lk.LorakitError(
                f"{self.args.model} has no chat template, as base models have none: name one with "
                "--chat-template, or continue texts with lorakit generate"
            )
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = messages or [{"role": "user", "content": "?"}]
        return tok.apply_chat_template([*system, *messages], add_generation_prompt=True)

    def _submit(self, messages: list[dict[str, Any]]) -> "lk.Request":
        """Ask the engine for an answer."""
        prompt, most = self._prompt(messages), self.args.max_new_tokens
        room = self.engine.capacity - len(prompt)
        if room < 1:
            raise lk.LorakitError(
                f"this chat has {len(prompt)} tokens, and there is room for {self.engine.capacity} "
                "with the answer: /undo forgets the last turn, /reset begins a new chat"
            )
        tok = self.toks[self.adapter]
        ends = [tok.decode([token], skip_special_tokens=False) for token in tok.end_token_ids]
        return self.engine.submit(
            prompt,
            self.sampling,
            max_new_tokens=room if most is None else min(most, room),
            adapter=self.adapter,
            stop=[*self.args.stop, *filter(None, ends)],
            seed=self.random.getrandbits(63),
        )


@contextlib.contextmanager
def _stoppable(request: "lk.Request") -> Iterator[None]:
    """Let Ctrl-C end the request after the step that runs; a second one ends the program."""
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        request.cancel()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
