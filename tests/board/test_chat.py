"""The chat: what both sides say is what their models say."""

import asyncio
import json
import os
import shutil
import time

import pytest
import torch

import lorakit as lk
from lorakit.board.answers import FAILED
from lorakit.board.app import Board, application
from lorakit.board.choices import choices
from lorakit.board.folder import Folder
from tests.board.conftest import TOKEN
from tests.conftest import tiny_llama, write_tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a base beside two adapters of it, of which b knows nothing of the other."""
    path = tmp_path_factory.mktemp("chat")
    config = {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512}
    tiny_llama(**config).save_pretrained(path / "tiny")
    write_tokenizer(path / "tiny")
    for seed, name in enumerate(("a", "b")):
        model = lk.attach(lk.load_model(path / "tiny", dtype="float32"), lk.LoraConfig(r=2))
        torch.manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, 0, 0.3)
        lk.save_adapter(model, path / "runs" / name)
        record = {"state": "finished", "model": "tiny", "cwd": str(path)}
        record |= {"settings": {"dtype": "float32", "quantize": None}}
        (path / "runs" / name / "run.json").write_text(json.dumps(record))
    return path


@pytest.fixture
def runs(made, tmp_path):
    return shutil.copytree(made / "runs", tmp_path / "trained")


@pytest.fixture
def board(runs):
    return Board(Folder(runs))


@pytest.fixture
def base(made):
    return str(made / "tiny")


class Page:
    """A page that asks a board, in the event loop of a test."""

    def __init__(self, board):
        self.app = application(board, TOKEN)

    async def ask(self, body, leaves_at=None):
        """Return the events of a chat. The page is closed when the text `leaves_at` has come."""
        said, gone, asked = b"", asyncio.Event(), False

        async def receive():
            nonlocal asked
            if asked:
                await gone.wait()
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message):
            nonlocal said
            said += message.get("body", b"")
            if leaves_at is not None and leaves_at in said:
                gone.set()

        headers = {b"host": b"127.0.0.1", b"content-type": b"application/json"}
        scope = {"type": "http", "method": "POST", "headers": list(headers.items())}
        scope |= {"raw_path": f"/{TOKEN}/api/chat".encode(), "path": f"/{TOKEN}/api/chat"}
        scope |= {"query_string": b"", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        await self.app(scope, receive, send)
        if said.startswith(b"{"):
            return json.loads(said)
        parts = said.decode().split("\n\n")[:-1]
        return [json.loads(part.removeprefix("data: ")) for part in parts]


def asking(board, work):
    """Return what a coroutine gives that asks a board, which ends with it."""

    async def all_of_it():
        try:
            return await work(Page(board))
        finally:
            board.close()
            await board.chat.end()

    return asyncio.run(asyncio.wait_for(all_of_it(), 60))


def question(base, *sides, **more):
    chats = [MESSAGES for _ in sides]
    return {"base": base, "sides": list(sides), "messages": chats, "max_new_tokens": 6, **more}


def texts(events):
    found = {}
    for event in events:
        if "text" in event:
            found[event["side"]] = found.get(event["side"], "") + event["text"]
    return found


def truth(base, adapter):
    """What a model says greedily, computed by `generate`."""
    tok, model = lk.load_tokenizer(base), lk.load_model(base, dtype="float32")
    if adapter is not None:
        lk.load_adapter(model, adapter)
    return lk.generate(model, tok, MESSAGES, max_new_tokens=6)


def test_what_the_chat_can_talk_to(get, folder, runs, base):
    for name in ("a", "b"):
        shutil.copytree(runs / name, folder / "of" / name)
    (folder / "deep" / "adapter_config.json").write_text("{}")  # no run
    expected = [{"name": base, "kind": "base", "run": None, "base": base, "label": "tiny"}]
    for id_ in ("of/a", "of/b"):
        expected.append({"name": id_, "kind": "adapter", "run": id_, "base": base, "label": id_})
    assert get("models") == expected


def test_a_run_that_goes_on_is_talked_to_by_its_last_checkpoint(runs):
    for step, name in ((1, "b"), (2, "a")):
        shutil.copytree(runs / name, runs / "a" / f"checkpoint-{step}")
        os.utime(runs / "a" / f"checkpoint-{step}" / "adapter_model.safetensors", (0, step))
    os.utime(runs / "a" / "adapter_model.safetensors", (0, 0))
    (runs / "a" / "checkpoint-3").symlink_to(runs / "b")
    os.utime(runs / "b" / "adapter_model.safetensors", (0, 9))
    assert choices(Folder(runs))["a"].place == str(runs / "a" / "checkpoint-2")
    os.utime(runs / "a" / "adapter_model.safetensors", (0, 2))  # it has ended
    assert choices(Folder(runs))["a"].place == str(runs / "a")


def test_a_model_that_was_trained_whole_is_a_base(made, runs):
    shutil.copytree(made / "tiny", runs / "whole")
    (runs / "whole" / "run.json").write_text("{}")
    assert choices(Folder(runs))["whole"].base == "whole"


def test_both_sides_say_what_their_models_say(board, runs, base):
    async def work(page):
        first = await page.ask(question(base, "a", "b"))
        second = await page.ask(question(base, base))
        return first, second

    first, second = asking(board, work)
    assert first[0] == {"loading": base}
    assert texts(first) == {0: truth(base, runs / "a"), 1: truth(base, runs / "b")}
    assert texts(first)[0] != texts(first)[1]
    assert {"side": 0, "done": True} in first
    assert first[-1] == {"done": True}
    assert texts(second) == {0: truth(base, None)}
    assert {"loading": base} not in second


def test_an_adapter_that_was_trained_on_is_loaded_again(board, made, runs, base):
    async def work(page):
        first = await page.ask(question(base, "a"))
        shutil.copy(runs / "b" / "adapter_model.safetensors", runs / "a")
        return first, await page.ask(question(base, "a"))

    first, second = asking(board, work)
    assert texts(first) == {0: truth(base, made / "runs" / "a")}
    assert texts(second) == {0: truth(base, runs / "b")}


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that the chat has begun."""
    from lorakit.board.chat import Chat

    jobs, begin = [], Chat.job

    async def job(*arguments):
        jobs.append(await begin(*arguments))
        return jobs[-1]

    monkeypatch.setattr(Chat, "job", job)
    return jobs


def test_closing_the_page_ends_the_text(board, base, jobs):
    asked = question(base, base, max_new_tokens=480, temperature=1.0, seed=3)

    async def work(page):
        await page.ask(asked, leaves_at=b'"text"')
        worker, end = board.chat.chat.loaded.worker, time.monotonic() + 20
        while worker.rows and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return worker.rows

    assert asking(board, work) == 0
    [request] = jobs[0].requests
    assert request.finish_reason == "cancelled"


def test_the_end_of_the_board_ends_the_text(board, base, jobs):
    asked = question(base, base, max_new_tokens=480, temperature=1.0, seed=3)

    async def work(page):
        chat = asyncio.ensure_future(page.ask(asked))
        while not (
            board.chat.chat and board.chat.chat.loaded and board.chat.chat.loaded.worker.rows
        ):
            await asyncio.sleep(0.01)
        board.close()
        return await chat

    events = asking(board, work)
    assert "shutting down" in events[-2].get("error", "")
    assert events[-1] == {"done": True}


def test_what_fails_is_a_sentence(board, runs, base):
    (runs / "a" / "adapter_model.safetensors").write_bytes(b"damaged")
    long = [{"role": "user", "content": "word " * 600}]

    async def work(page):
        damaged = await page.ask(question(base, "a", "b"))
        return damaged, await page.ask({**question(base, base), "messages": [long]})

    damaged, too_long = asking(board, work)
    [error] = [event for event in damaged if "error" in event]
    assert error["side"] == 0
    assert "adapter_model.safetensors" in error["error"]
    assert set(texts(damaged)) == {1}  # the other side goes on
    assert "there is room for" in too_long[-2]["error"]


def test_what_nobody_foresaw_ends_the_answer(board, base, monkeypatch, caplog):
    """The page is told, and does not wait for a side that says nothing more."""

    async def job(*arguments):
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr("lorakit.board.chat.Chat.job", job)

    async def work(page):
        return await page.ask(question(base, "a", base))

    failed = [{"side": i, "error": FAILED} for i in range(2)]
    assert asking(board, work) == [{"loading": base}, *failed, {"done": True}]
    assert "ZeroDivisionError: by hand" in caplog.text


def test_a_base_that_cannot_be_loaded_is_a_sentence(board, runs, tmp_path):
    for name in ("a", "b"):
        record = json.loads((runs / name / "run.json").read_text())
        record["model"] = "nowhere"
        (runs / name / "run.json").write_text(json.dumps(record))

    async def work(page):
        return await page.ask(question("nowhere", "a"))

    assert asking(board, work) == [
        {"loading": "nowhere"},
        {"error": "nowhere does not exist."},
        {"done": True},
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": "nowhere/else"}, "There is no model 'nowhere/else'"),
        ({"base": "/etc"}, "There is no model '/etc'"),
        ({"sides": ["a", "a", "a"]}, "sides must be a list of 1 to 2 names"),
        ({"sides": [3]}, "sides must be a list of 1 to 2 names"),
        ({"sides": ["c"]}, "There is no model 'c'"),
        ({"base": "a"}, "belongs to"),
        ({"messages": [MESSAGES, MESSAGES]}, "one for each side"),
        ({"messages": [[]]}, "at least one message"),
        ({"messages": [[{"role": "x", "content": ""}]]}, "A message must have a role"),
        ({"messages": [[{"role": ["user"], "content": ""}]]}, "A message must have a role"),
        ({"messages": [[{"role": "user", "content": ["x"]}]]}, "A message must have a role"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_a_wrong_question_is_refused(board, base, change, said):
    async def work(page):
        return await page.ask({**question(base, "a"), **change})

    found = asking(board, work)
    assert said in found["error"]
    assert board.chat.chat is None  # nothing was loaded
