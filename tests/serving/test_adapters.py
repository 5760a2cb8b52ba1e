"""Adapters that come and go while the endpoint runs, by the paths that vLLM has."""

import json
import shutil
import threading

import openai
import pytest
import torch

import lorakit as lk
from lorakit.serving.adapters import Models
from tests.serving.running import MESSAGES, NO_END, running

ASK = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, "logit_bias": NO_END}


@pytest.fixture(scope="module")
def server(tiny):
    with running(tiny) as server:
        yield server


def load(server, name, path):
    body = {"lora_name": name, "lora_path": str(path)}
    # json.dumps writes half a surrogate pair as an escape; httpx's own JSON refuses it
    headers = {"Content-Type": "application/json"}
    return server.post("/v1/load_lora_adapter", content=json.dumps(body), headers=headers)


def unload(server, name):
    return server.post("/v1/unload_lora_adapter", json={"lora_name": name})


def ask(server, name, **more):
    found = server.client.chat.completions.create(model=name, **ASK | more)
    return found.choices[0].message.content


def test_an_adapter_comes_and_goes(server, adapters, truth):
    ids = truth.ids(MESSAGES)
    with pytest.raises(openai.NotFoundError):
        ask(server, "mine.1")
    done = load(server, "mine.1", adapters["ann"])
    assert (done.status_code, done.text) == (
        200, "Success: LoRA adapter 'mine.1' added successfully.",
    )  # fmt: skip
    assert ask(server, "mine.1") == truth.text(ids, 12, "ann")
    assert ask(server, "tiny") == truth.text(ids, 12)
    assert load(server, "mine.1", adapters["bob.v2"]).status_code == 400  # the name is taken
    assert unload(server, "mine.1").status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(server, "mine.1")
    assert load(server, "mine.1", adapters["bob.v2"]).status_code == 200
    assert ask(server, "mine.1") == truth.text(ids, 12, "bob.v2")  # nothing is left of the first
    assert unload(server, "mine.1").status_code == 200
    assert ask(server, "tiny") == truth.text(ids, 12)


def test_texts_that_run_go_on_while_adapters_change(server, adapters, truth):
    """A long text of an adapter that is unloaded meanwhile gets to its end."""
    ids = truth.ids(MESSAGES)
    assert load(server, "ann", adapters["ann"]).status_code == 200
    stream = server.client.chat.completions.create(
        model="ann", stream=True, **ASK | {"max_tokens": 100}
    )
    pieces = [next(iter(stream))]
    assert load(server, "bob", adapters["bob.v2"]).status_code == 200
    gone = []
    waits = threading.Thread(target=lambda: gone.append(unload(server, "ann")))
    waits.start()
    pieces += list(stream)
    waits.join()
    assert gone[0].status_code == 200
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == truth.text(ids, 100, "ann")
    assert ask(server, "bob") == truth.text(ids, 12, "bob.v2")
    assert unload(server, "bob").status_code == 200


def test_a_broken_adapter_changes_nothing(server, adapters, tmp_path, tiny):
    broken = shutil.copytree(adapters["ann"], tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    other = shutil.copytree(adapters["ann"], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    soft = tmp_path / "soft"
    prompt = lk.PromptTuningConfig(num_virtual_tokens=3)
    lk.save_adapter(lk.attach(lk.load_model(tiny), prompt), soft)
    before = {
        name: value.clone() for name, value in server.endpoint.models.model.state_dict().items()
    }
    for path, said in [
        (broken, "adapter_model.safetensors"),
        (other, "lora_A"),
        (soft, "learned prompt"),
        (tmp_path / "none", "does not exist"),
        (tmp_path, "adapter_config.json"),
    ]:
        response = load(server, "new", path)
        assert response.status_code == 400
        assert said in response.json()["error"]["message"], response.text
    after = server.endpoint.models.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [card.id for card in server.client.models.list()] == ["tiny"]


def test_wrong_names(server):
    for response, status in [
        (unload(server, "tiny"), 400),
        (unload(server, "nobody"), 404),
        (server.post("/v1/unload_lora_adapter", json={}), 400),
        (server.post("/v1/load_lora_adapter", json={"lora_name": "a"}), 400),
        (server.post("/v1/load_lora_adapter", json={"lora_name": 1, "lora_path": "b"}), 400),
        (load(server, "", "x"), 400),
        (load(server, "half \ud800", "x"), 400),
        (load(server, "a", "half \ud800"), 400),
    ]:
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_an_adapter_has_the_template_beside_it(server, adapters, truth, tmp_path):
    own = shutil.copytree(adapters["ann"], tmp_path / "own")
    (own / "chat_template.jinja").write_text("{{ messages[0].content }}=")
    assert load(server, "own", own).status_code == 200
    assert ask(server, "own") == truth.text(
        truth.tok.encode("hello=", add_special_tokens=False), 12, "ann"
    )
    assert unload(server, "own").status_code == 200
    tok = lk.load_tokenizer(truth.tok.source)
    tok.add_special_tokens(["<new>"])
    tok.save(own)
    response = load(server, "own", own)
    assert response.status_code == 400
    assert "tokenizer of its own" in response.json()["error"]["message"]


def test_adapters_of_a_model_are_served_by_their_names(tiny):
    model, tok = lk.load_model(tiny), lk.load_tokenizer(tiny)
    lk.attach(model, lk.LoraConfig(r=2), name="first")
    assert Models(model, tok, "base").names == ["base", "first"]
    with pytest.raises(lk.LorakitError, match="'first' is taken"):
        Models(model, tok, "first")
