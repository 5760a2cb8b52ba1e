"""An endpoint that runs in a thread, and what its models would write."""

import socket
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import torch
import uvicorn

import lorakit as lk
from lorakit.serving.adapters import Models
from lorakit.serving.endpoint import Endpoint, application

MESSAGES = [{"role": "user", "content": "hello"}]
NO_END = {"2": -100}  # a bias that keeps the tiny model from ending its text


class Running:
    """An endpoint that listens, and clients of it."""

    def __init__(self, url, endpoint):
        self.url, self.endpoint = url, endpoint
        self.http = httpx.Client(base_url=url, timeout=60)
        self.client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, http_client=self.http
        )

    def get(self, path, **options):
        return self.http.get(path, **options)

    def post(self, path, **options):
        return self.http.post(path, **options)

    def metric(self, line):
        page = self.get("/metrics").text
        [value] = [each.split()[-1] for each in page.splitlines() if each.startswith(f"{line} ")]
        return float(value)

    def wait_until_idle(self):
        """Wait until no row is left; the time is an engine's step or two."""
        for _ in range(200):
            if self.metric("lorakit_texts_running") + self.metric("lorakit_texts_waiting") == 0:
                return
            time.sleep(0.02)
        raise AssertionError("rows are left")


@contextmanager
def running(
    path, adapters=(), *, slots=8, capacity=256, queue=64, api_key=None, hosts=None, may_load=True
):
    """Serve a model's directory with adapters, on a free port."""
    model, tok = lk.load_model(path, dtype="float32"), lk.load_tokenizer(path)
    models = Models(model, tok, "tiny")
    for name, place in dict(adapters).items():
        models.add(name, place)
    endpoint = Endpoint(
        model,
        tok,
        models,
        slots=slots,
        capacity=capacity,
        most_waiting=queue,
        may_load=may_load,
    )
    app = application(endpoint, api_key=api_key, hosts=hosts)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            found = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", endpoint)
            with found.http:
                yield found
        finally:
            server.should_exit = True
            thread.join()


class Truth:
    """What the models write: the likeliest token, each from a pass over the whole row."""

    def __init__(self, path, adapters):
        self.tok, self.model = lk.load_tokenizer(path), lk.load_model(path, dtype="float32")
        for name, place in adapters.items():
            lk.load_adapter(self.model, place, name=name.replace(".", "_"))

    def ids(self, messages):
        return self.tok.apply_chat_template(messages, add_generation_prompt=True)

    @torch.no_grad()
    def logits(self, ids, name="tiny"):
        adapter = None if name == "tiny" else name.replace(".", "_")
        with lk.adapter_rows(self.model, [adapter]):
            return self.model(torch.tensor([ids]))[0]

    def tokens(self, ids, count, name="tiny"):
        """The next tokens, none of them the end."""
        row = list(ids)
        for _ in range(count):
            logits = self.logits(row, name)[-1]
            logits[2] -= 100  # NO_END
            row.append(int(logits.argmax()))
        return row[len(ids) :]

    def text(self, ids, count, name="tiny"):
        return self.tok.decode(self.tokens(ids, count, name))
