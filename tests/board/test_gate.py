"""Who may ask a board: its own page, and nobody else."""

import os

import pytest

from lorakit.board.answers import MOST_BYTES
from lorakit.board.gate import HEADERS
from tests.board.conftest import TOKEN

RUNS = f"/{TOKEN}/api/runs"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "evil@127.0.0.1", "0.0.0.0:8700", "", "127.0.0.1:x"],
)
def test_another_host_is_refused(client, host):
    response = client.get(RUNS, headers={"Host": host})
    assert response.status_code == 403
    assert "Host must name this machine" in response.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8700", "[::1]:8700", "LOCALHOST"])
def test_the_names_of_loopback_are_served(client, host):
    assert client.get(RUNS, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/api/runs", "/wrong/api/runs", f"/{TOKEN}x/", f"/{TOKEN[:-1]}/", "//", "/%ff/"]
)
def test_without_the_token_there_is_nothing(client, path):
    response = client.get(path)
    assert response.status_code == 403
    assert "lacks the token" in response.json()["error"]
    assert TOKEN not in response.text


@pytest.mark.parametrize("path", ["", "/", "/api/runs", "/api/nothing", "/static/nothing.js"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "DELETE"])
def test_every_answer_carries_the_headers(client, path, method):
    response = client.request(method, f"/{TOKEN}{path}", follow_redirects=False)
    for name, value in HEADERS.items():
        assert response.headers[name] == value
    assert "Access-Control-Allow-Origin" not in response.headers
    assert method != "HEAD" or not response.content


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:8700"}, 403),
        ({"Origin": "http://127.0.0.1:8701"}, 403),
        ({"Origin": "http://localhost:8700"}, 403),  # another name is another origin
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_another_page_cannot_change_anything(client, headers, status):
    asked = {"Content-Type": "application/json", **headers}
    response = client.post(RUNS, content="{}", headers=asked)
    assert response.status_code == status


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH"])
def test_other_methods_are_refused(client, method):
    headers = {"Content-Type": "application/json"}
    assert client.request(method, RUNS, headers=headers).status_code == 405


@pytest.mark.parametrize(
    "id_",
    [
        "..",
        "%2e%2e",
        "..%2Fsecret",
        "%2e%2e%2fsecret",
        "a%2F..%2F..%2Fsecret",
        "%2Fetc",
        "ABSOLUTE",
        "a%00",
        "%ff",
        "link",
        "link%2Fa",
        "a%2F",
        "%2Fa",
        "a%2F%2Fb",
        "%2E",
        "%252e%252e%252fsecret",
        "x" * 5000,
        "..%5Csecret",
    ],
)
@pytest.mark.parametrize("what", ["metrics", "settings", "samples"])
def test_a_path_outside_the_folder_is_not_there(client, folder, tmp_path, id_, what):
    os.symlink(tmp_path / "secret", folder / "link")
    id_ = id_.replace("ABSOLUTE", str(tmp_path / "secret").replace("/", "%2F"))
    response = client.get(f"{RUNS}/{id_}/{what}")
    # the client itself takes ".." out of a path; what is left is then no path of a board
    assert response.status_code in (404, 403)
    assert "666" not in response.text


def test_a_link_to_a_file_outside_is_not_read(client, folder, tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl", "run.json", "run.yaml"):
        (folder / "a" / name).unlink(missing_ok=True)
        os.symlink(tmp_path / "secret" / "metrics.jsonl", folder / "a" / name)
    (folder / "a" / ".started").touch()
    for what in ("metrics", "samples", "settings", "run_file", "evaluations"):
        assert "666" not in client.get(f"{RUNS}/a/{what}").text
    assert client.get(f"{RUNS}/a/metrics").json() == {}


@pytest.mark.parametrize(
    "file", ["../app.py", "%2e%2e/app.py", "..%2Fapp.py", "/etc/passwd", "%2Fetc%2Fpasswd", ""]
)
def test_no_file_beside_the_page(client, file):
    response = client.get(f"/{TOKEN}/static/{file}")
    assert response.status_code == 404
    assert "error" in response.json()


def test_a_body_that_is_too_long_or_no_json(client):
    headers = {"Content-Type": "application/json"}
    long = b'{"run_file": "' + b"x" * MOST_BYTES + b'"}'
    for body, status in [(long, 413), (b"[]", 400), (b"{", 400), (b'{"a": NaN}', 400)]:
        response = client.post(RUNS, content=body, headers=headers)
        assert response.status_code == status
        assert isinstance(response.json()["error"], str)


def test_a_ticket_leads_to_the_page_once(client):
    ticket = client.app.ticket()
    assert client.head(f"/{ticket}").status_code == 403  # who looks ahead does not use it up
    first = client.get(f"/{ticket}", follow_redirects=False)
    assert first.headers["Location"] == f"/{TOKEN}/"
    assert client.get(f"/{ticket}", follow_redirects=False).status_code == 403
    other = client.app.ticket()
    assert client.get(f"/{other}", headers={"Host": "evil.example"}).status_code == 403
