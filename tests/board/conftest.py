"""A folder of runs as files, and a client of a board over it."""

import pytest
from starlette.testclient import TestClient

from lorakit.board.app import Board, application
from lorakit.board.folder import Folder

from . import chromium
from .folders import write_lines

TOKEN = "secret"


def write_metrics(run, steps, **more):
    """Write the metrics of a run with a loss of 1 / step."""
    run.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": i, "loss": 1 / i, "tokens": 100 * i, "tokens_per_second": 50.0, **more}
        for i in range(1, steps + 1)
    ]
    write_lines(run / "metrics.jsonl", lines)


@pytest.fixture
def folder(tmp_path):
    """A folder with two runs, and secrets beside it."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "metrics.jsonl").write_text('{"step": 1, "loss": 666}\n')
    root = tmp_path / "runs"
    write_metrics(root / "a", 10, peak_memory_mb=70.0)
    write_metrics(root / "deep" / "b c", 3)
    return root


@pytest.fixture
def client(folder):
    board = Board(Folder(folder))
    with TestClient(application(board, TOKEN), base_url="http://127.0.0.1:8700") as client:
        client.board = board
        yield client
    board.close()


@pytest.fixture
def get(client):
    """get("runs") -> the answer of api/runs, which must be right."""

    def get(path):
        response = client.get(f"/{TOKEN}/api/{path}")
        assert response.status_code == 200, response.text
        return response.json()

    return get


@pytest.fixture
def refused(client):
    """refused("runs/x") -> the status and the sentence of an error."""

    def refused(path, **body):
        url = f"/{TOKEN}/api/{path}"
        response = client.post(url, json=body) if body else client.get(url)
        assert response.status_code >= 400
        [name] = response.json()
        assert name == "error"
        return response.status_code, response.json()["error"]

    return refused


@pytest.fixture(scope="session")
def browser():
    """Chromium; the test is skipped if something for it is missing."""
    if (what := chromium.missing()) is not None:
        pytest.skip(what)
    with chromium.started() as browser:
        yield browser
