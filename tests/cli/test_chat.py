"""`lorakit chat`: the answers are those of `generate` on the same messages, whoever answers."""

import io
import os
import pty
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import lorakit as lk
from lorakit.cli.main import main
from tests.conftest import tiny_llama, write_tokenizer

NEW = 6  # tokens of an answer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with room for a chat, and two adapters beside it."""
    path = tmp_path_factory.mktemp("chat")
    tiny_llama(vocab_size=300, max_position_embeddings=512).save_pretrained(path / "model")
    write_tokenizer(path / "model")
    torch.manual_seed(0)
    for name in ("a", "b.1"):
        adapted = lk.attach(lk.load_model(path / "model", dtype="float32"), lk.LoraConfig(r=2))
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, 0, 0.3)
        lk.save_adapter(adapted, path / name)
    return path / "model"


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """talk(lines, *options) runs the command on lines: its exit code, answers and other words."""

    def run(lines, *options, path=model):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        short = ["--dtype", "float32", "--max-new-tokens", str(NEW)]
        code = main(["chat", str(path), *short, *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


class Twin:
    """A chat by `generate`, which prints what the command must print."""

    def __init__(self, model, adapters=()):
        self.model, self.tok = lk.load_model(model, dtype="float32"), lk.load_tokenizer(model)
        self.messages, self.printed = [], ""
        for name, path in adapters:
            lk.load_adapter(self.model, path, name=name)

    def answer(self, text):
        self.messages.append({"role": "user", "content": text})
        answer = lk.generate(self.model, self.tok, self.messages, max_new_tokens=NEW)
        self.messages.append({"role": "assistant", "content": answer})
        self.printed += answer + "\n"


def test_a_chat_has_a_history_and_a_system_prompt(talk, model):
    twin = Twin(model)
    twin.messages.append({"role": "system", "content": "Be kind."})
    for text in ("hello", "two\nlines", "/etc/x is text"):
        twin.answer(text)
    lines = ["hello", "", "two\\", "lines", "/etc/x is text", "/system"]
    code, answers, others = talk(lines, "--system", "Be kind.")
    assert (code, answers) == (0, twin.printed)
    note = "(the answer ends at --max-new-tokens)\n"
    assert others == 3 * note + "Be kind.\n"


def test_adapters_change_within_a_chat(talk, model):
    """An adapter without a name is called as its directory is, without dots."""
    paths = model.parent / "a", model.parent / "b.1"
    twin = Twin(model, [("first", paths[0]), ("b-1", paths[1])])
    answers = []
    for name in ("first", "b-1", None, "first"):
        if name is None:
            with lk.disable_adapters(twin.model):
                twin.answer("hello")
        else:
            lk.set_adapter(twin.model, name)
            twin.answer("hello")
        answers.append(twin.messages[-1]["content"])
    assert len(set(answers[:3])) == 3  # each matters
    lines = ["hello", "/adapter b-1", "hello", "/adapter none", "/adapter", "hello"]
    lines += ["/adapter c", "/adapter first", "hello"]
    options = ["--adapter", f"first={paths[0]}", "--adapter", str(paths[1])]
    code, printed, others = talk(lines, *options)
    assert (code, printed) == (0, twin.printed)
    assert "* none\n  first\n  b-1\n" in others
    assert "there is no adapter 'c'; there are none, first, b-1\n" in others


def test_commands_that_change_the_history(talk, model):
    twin = Twin(model)
    twin.answer("hello")
    twin.answer("more")
    second = twin.printed
    del twin.messages[-2:]
    twin.answer("other")  # after /undo
    third = twin.printed[len(second) :]
    twin.messages = []
    twin.answer("new")
    lines = ["/retry", "hello", "more", "/undo", "other", "/retry", "/reset", "/undo", "new"]
    _, printed, others = talk([*lines, "/nothing", "/help", "/exit", "never answered"])
    assert printed == second + third + third + twin.printed[len(second + third) :]
    assert others.count("lorakit: nothing has been answered yet\n") == 2
    assert "lorakit: there is no command /nothing; /help lists those that there are\n" in others
    assert "\n/adapter NAME " in others


def test_another_system_prompt_keeps_the_chat(talk, model):
    twin = Twin(model)
    twin.answer("hello")
    twin.messages.insert(0, {"role": "system", "content": "Be kind."})
    twin.answer("hello")
    del twin.messages[0]
    twin.answer("hello")
    lines = ["hello", "/system Be kind.", "hello", "/system none", "/system", "hello"]
    _, printed, others = talk(lines)
    assert printed == twin.printed
    assert "there is no system prompt\n" in others


def test_a_turn_is_read_from_where_the_last_one_ended(talk, model, monkeypatch):
    seen = []

    class Engine(lk.Engine):
        def submit(self, *arguments, **options):
            seen.append(super().submit(*arguments, **options))
            return seen[-1]

    monkeypatch.setattr(lk, "Engine", Engine)
    talk(["hello " * 50, "what is there to see", "/retry"])
    first, second, third = [request for request in seen if not request.cancelled]
    read = second.cached_tokens
    assert read > len(first.prompt) - 128  # the cache may share whole pages only
    assert (first.prompt + first.tokens)[:read] == second.prompt[:read]
    assert third.cached_tokens >= read


def test_drawn_answers_follow_from_the_seed(talk):
    """/retry draws again; the same seed gives the same chat."""
    lines, options = ["hello", "/retry", "/retry"], ["--temperature", "2", "--seed"]
    first, again, other = (talk(lines, *options, seed)[1] for seed in ("3", "3", "4"))
    assert first == again != other
    repeated = first[: len(first) // 3] * 3
    assert first != repeated


def test_a_full_chat_says_so_and_goes_on(talk, model):
    twin = Twin(model)
    twin.answer("hello")
    twin.answer("more")
    _, printed, others = talk(["hello", "x" * 600, "more"])
    assert printed == twin.printed  # the long message is forgotten, and nothing else
    assert "tokens, and there is room for 512 with the answer: /undo forgets" in others


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapter", "a=/nowhere"], "adapter_config.json does not exist"),
        (["--adapter", "{a}", "--adapter", "{a}"], "two adapters have one name; write NAME="),
        (["--adapter", "none={a}"], "/adapter none means no adapter; write NAME="),
        (["--adapter", "a.b={a}"], "'a.b' is no name for an adapter"),
        (["--system", "x" * 600], "there is room for 512 with the answer"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--top-p", "0"], "top_p must be in (0, 1]"),
    ],
)
def test_what_cannot_be_is_told_before_a_message(talk, model, options, said):
    a = str(model.parent / "a")
    code, printed, others = talk(["hello"], *(option.format(a=a) for option in options))
    assert (code, printed) == (1, "")
    assert said in others
    assert others.startswith("lorakit: ")
    assert others.count("\n") == 1


@pytest.mark.parametrize("name", ["=x", "a="])
def test_an_adapter_without_a_name_or_a_place(talk, name, capsys):
    with pytest.raises(SystemExit):
        talk([], "--adapter", name)
    assert "is not of the form NAME=ADAPTER" in capsys.readouterr().err


def test_a_base_model_has_no_chat(talk, model, tmp_path):
    """But it has one with a template, by name or beside its adapter."""
    os.symlink(model / "model.safetensors", tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        os.symlink(model / name, tmp_path / name)
    code, _, others = talk(["hello"], path=tmp_path)
    assert code == 1
    assert others.startswith(f"lorakit: {tmp_path} has no chat template, as base models have none")
    assert talk(["hello"], "--chat-template", "chatml", path=tmp_path)[0] == 0


def test_a_template_without_a_system_prompt(talk, tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "own.jinja").write_text(template + "<s>{{ messages[-1].content }}")
    own = ["--chat-template", str(tmp_path / "own.jinja")]
    code, _, others = talk(["hello"], "--system", "Be kind.", *own)
    assert (code, "no system" in others) == (1, True)
    lines = ["/system Be kind.", "/system", "hello"]
    code, printed, others = talk(lines, *own)
    assert code == 0
    assert printed
    assert "no system\nthere is no system prompt\n" in others  # it stayed as it was


def test_each_adapter_is_spoken_to_by_its_own_template(talk, model, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        os.symlink(model.parent / "a" / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text("<s>{{ messages[-1].content }}!")
    twin = Twin(model, [("a", tmp_path)])
    twin.tok = lk.load_tokenizer(model, chat_template=tmp_path)
    twin.answer("hello")
    twin.tok = lk.load_tokenizer(model)
    with lk.disable_adapters(twin.model):
        twin.answer("hello")
    _, printed, _ = talk(["hello", "/adapter none", "hello"], "--adapter", f"a={tmp_path}")
    assert printed == twin.printed


def test_a_last_line_that_would_go_on_is_answered(talk):
    _, printed, _ = talk(["hello"])
    assert talk(["hello\\"])[1] == printed != ""


def test_no_text_from_a_pipe_is_one_sentence(talk, model, monkeypatch, capsys):
    """A byte that is no UTF-8; the next line is answered."""
    _, printed, _ = talk(["hello"])
    pipe = io.TextIOWrapper(io.BytesIO(b"a\xff\nhello\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", pipe)
    short = ["--dtype", "float32", "--max-new-tokens", str(NEW)]
    assert main(["chat", str(model), *short]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("lorakit: not valid Unicode text")
    assert said.out == printed


def test_a_learned_prompt_cannot_chat(talk, model, tmp_path):
    learned = lk.attach(lk.load_model(model), lk.PromptTuningConfig(num_virtual_tokens=2))
    lk.save_adapter(learned, tmp_path / "p")
    code, _, others = talk(["hello"], "--adapter", str(tmp_path / "p"))
    assert (code, "adapter 'p' is a learned prompt, which all rows share" in others) == (1, True)


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, code):
        self.end, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdin=inner,
            stdout=inner,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(inner)
        self.seen = ""

    def until(self, text):
        """Return what is shown up to `text`, and after what was returned before."""
        while text not in self.seen:
            try:
                self.seen += os.read(self.end, 4096).decode()
            except OSError:  # nobody is at the other end
                break
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, line):
        os.write(self.end, line.encode())


STOPPED = """
    import os, signal, sys
    import lorakit as lk
    from lorakit.cli.main import main

    class Engine(lk.Engine):
        steps = 0
        def submit(self, prompt, *rest, **options):
            with open({file!r}, "w") as file:
                print(self.tok.decode(prompt, False), file=file)
            return super().submit(prompt, *rest, **options)
        def step(self):
            Engine.steps += 1
            if Engine.steps == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step()

    lk.Engine = Engine
    sys.exit(main(["chat", {model!r}, "--dtype", "float32", "--max-new-tokens", "30"]))
"""


def test_ctrl_c_stops_an_answer_and_ends_a_chat(model, tmp_path):
    """What was said before Ctrl-C stays in the history; at a prompt it ends the chat."""
    twin = Twin(model)
    terminal = Terminal(STOPPED.format(model=str(model), file=str(tmp_path / "prompt")))
    assert "/help lists what can be typed" in terminal.until("\n> ")
    terminal.type("hello\n")
    shown = terminal.until("\n> ").replace("\r\n", "\n").removeprefix("hello\n")
    terminal.type("more\n")
    assert "(the answer ends at --max-new-tokens)" in terminal.until("\n> ")
    twin.messages.append({"role": "user", "content": "hello"})
    said = lk.generate(twin.model, twin.tok, twin.messages, max_new_tokens=4)
    start = twin.tok.apply_chat_template(twin.messages, False, add_generation_prompt=True)
    before, _, after = (tmp_path / "prompt").read_text()[len(start) :].partition("</s>")
    assert said.startswith(before)
    assert before
    assert after == "<s>user: more</s><s>assistant: \n"
    assert shown.rstrip() == before.rstrip()
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(60) == 0
    os.close(terminal.end)
