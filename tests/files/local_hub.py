"""A small Hub on loopback, for huggingface_hub itself: repositories, commits, LFS and downloads.

It has what huggingface_hub calls when lorakit pushes and pulls. Any other request is an error that
the fixture reports. The rules of /api/validate-yaml are those of the Hub that a model card can
break: the forms of ids, the known relations, a license with its name.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests import programs

Files = dict[str, bytes]
TOKENS = {"Bearer hf_writer": "write", "Bearer hf_reader": "read"}
ID = re.compile(r"[\w.-]+/[\w.-]+")
RELATIONS = {"adapter", "finetune", "merge", "quantized"}


@dataclass
class Repo:
    """A repository: its commits, and the last commit of each branch."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str = "") -> str:
        """Add files to a branch, and return the name of the commit."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        name = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = before | files
        self.branches[branch] = name
        self.messages.append(message)
        return name

    def files(self, revision: str = "main") -> Files:
        """Return the files of a branch or a commit."""
        return self.commits[self.branches.get(revision, revision)]


class Hub:
    """The state of the server, and a way to run a program that talks to it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by their sha256
        self.requests: list[str] = []
        self.surprises: list[str] = []
        self.endpoint = ""

    def add(self, repo_id: str, files: Files, *, private: bool = False) -> Repo:
        """Add a repository with files on its main branch."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": b""} | files)
        return repo

    def run(self, cwd: Path, *command: str, token: str = "hf_writer", **env: str) -> Any:
        """Run Python with arguments in the directory `cwd`, with this Hub as its Hub."""
        mine = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cwd / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token,
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return programs.run(command, cwd=cwd, env=kept | mine | env)


def complaints(card: str) -> list[str]:
    """Return what /api/validate-yaml refuses in a card."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        values = {} if found is None else yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        return [str(error)]
    said = []
    bases = values.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not ID.fullmatch(base):
            said.append(f'"base_model" with value "{base}" is not valid')
    for data in values.get("datasets", []):
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", data):
            said.append(f'"datasets" with value "{data}" is not valid')
    if values.get("base_model_relation", "adapter") not in RELATIONS:
        said.append('"base_model_relation" must be one of adapter, finetune, merge, quantized')
    if values.get("license") == "other" and "license_name" not in values:
        said.append('"license_name" is required with license: other')
    if not all(isinstance(tag, str) for tag in values.get("tags", [])):
        said.append('"tags" must be a list of strings')
    return said


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Say nothing on standard error."""

        def answer(self, status: int, body: Any = None, **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            headers.setdefault("Content-Type", "application/json")
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def refuse(self, status: int, code: str, message: str) -> None:
            self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def handle_any(self) -> None:
            url = urlsplit(self.path)
            path, data = unquote(url.path), self.body()
            hub.requests.append(f"{self.command} {path}")
            right = TOKENS.get(self.headers.get("Authorization", ""))
            for method, pattern, needs, do in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    if needs and right is None:
                        return self.refuse(401, "", "Invalid username or password.")
                    if needs and right != "write":
                        return self.refuse(403, "", "You have no right to write here.")
                    repo_id = match.groupdict().get("repo")
                    if repo_id is not None:
                        repo = hub.repos.get(repo_id)
                        if repo is None or (repo.private and right is None):
                            return self.refuse(404, "RepoNotFound", "Repository not found")
                    return do(self, match, data, parse_qs(url.query))
            hub.surprises.append(f"{self.command} {self.path}")
            return self.refuse(501, "", f"this Hub has no {self.command} {path}")

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        # ---- what huggingface_hub asks ----

        def create(self, match: Any, data: bytes, query: Any) -> None:
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{hub.endpoint}/{name}", "name": name}
            if name in hub.repos:
                return self.answer(409, {"error": "You already created this repo", **url})
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.add(name, {}, private=bool(private))
            return self.answer(200, url)

        def info(self, match: Any, data: bytes, query: Any) -> None:
            repo = hub.repos[match["repo"]]
            revision = match.groupdict().get("rev") or "main"
            if revision not in repo.branches and revision not in repo.commits:
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            files = repo.files(revision)
            return self.answer(
                200,
                {
                    "id": match["repo"],
                    "sha": repo.branches.get(revision, revision),
                    "private": repo.private,
                    "siblings": [{"rfilename": name} for name in files],
                },
            )

        def tree(self, match: Any, data: bytes, query: Any) -> None:
            files = hub.repos[match["repo"]].files(match["rev"])
            self.answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(text), "oid": _oid(text)}
                    for name, text in files.items()
                ],
            )

        def branch(self, match: Any, data: bytes, query: Any) -> None:
            repo = hub.repos[match["repo"]]
            if match["branch"] in repo.branches:
                return self.answer(409, {"error": "Reference already exists"})
            repo.branches[match["branch"]] = repo.branches["main"]
            return self.answer(200, {})

        def resolve(self, match: Any, data: bytes, query: Any) -> None:
            repo = hub.repos[match["repo"]]
            revision = match["rev"]
            if revision not in repo.branches and revision not in repo.commits:
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            commit = repo.branches.get(revision, revision)
            found = repo.commits[commit].get(match["file"])
            if found is None:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            return self.answer(
                200,
                found,
                ETag=f'"{_oid(found)}"',
                X_Repo_Commit=commit,
                Content_Type="application/octet-stream",
            )

        def validate(self, match: Any, data: bytes, query: Any) -> None:
            said = complaints(json.loads(data)["content"])
            errors = {"errors": [{"message": each} for each in said], "warnings": []}
            self.answer(400 if said else 200, errors)

        def preupload(self, match: Any, data: bytes, query: Any) -> None:
            there = hub.repos[match["repo"]].files(match["rev"])
            found = []
            for each in json.loads(data)["files"]:
                name = each["path"]
                mode = "lfs" if name.endswith((".safetensors", ".gguf")) else "regular"
                known = {"oid": _oid(there[name])} if name in there and mode == "regular" else {}
                found.append({"path": name, "uploadMode": mode, "shouldIgnore": False, **known})
            self.answer(200, {"files": found})

        def batch(self, match: Any, data: bytes, query: Any) -> None:
            objects = []
            for each in json.loads(data)["objects"]:
                upload = {"href": f"{hub.endpoint}/lfs/{each['oid']}"}
                actions = {} if each["oid"] in hub.objects else {"actions": {"upload": upload}}
                objects.append({"oid": each["oid"], "size": each["size"], **actions})
            self.answer(200, {"transfer": "basic", "objects": objects})

        def put(self, match: Any, data: bytes, query: Any) -> None:
            if hashlib.sha256(data).hexdigest() != match["oid"]:
                return self.answer(400, {"error": "another sha256"})
            hub.objects[match["oid"]] = data
            return self.answer(200, {})

        def commit(self, match: Any, data: bytes, query: Any) -> None:
            head, *lines = map(json.loads, data.splitlines())
            files = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                else:
                    assert line["key"] == "lfsFile", line
                    files[value["path"]] = hub.objects[value["oid"]]
            repo = hub.repos[match["repo"]]
            name = repo.commit(match["rev"], files, head["value"]["summary"])
            url = f"{hub.endpoint}/{match['repo']}/commit/{name}"
            self.answer(200, {"commitUrl": url, "commitOid": name, "success": True})

    repo, rev = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)"
    ROUTES = [
        (("POST",), r"/api/repos/create", True, Handler.create),
        (("POST",), r"/api/validate-yaml", False, Handler.validate),
        (("POST",), rf"/api/models/{repo}/preupload/{rev}", True, Handler.preupload),
        (("POST",), rf"/api/models/{repo}/commit/{rev}", True, Handler.commit),
        (("POST",), rf"/api/models/{repo}/branch/(?P<branch>.+)", True, Handler.branch),
        (("GET",), rf"/api/models/{repo}", False, Handler.info),
        (("GET",), rf"/api/models/{repo}/revision/{rev}", False, Handler.info),
        (("GET",), rf"/api/models/{repo}/tree/{rev}", False, Handler.tree),
        (("POST",), rf"/{repo}\.git/info/lfs/objects/batch", True, Handler.batch),
        (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", False, Handler.put),
        (("GET", "HEAD"), rf"/{repo}/resolve/{rev}/(?P<file>.+)", False, Handler.resolve),
    ]
    return Handler


def _oid(data: bytes) -> str:
    """Return the name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def local_hub() -> Iterator[Hub]:
    """Serve a Hub on loopback within the block; raise AssertionError for requests it lacks."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
        assert not hub.surprises, hub.surprises
    finally:
        server.shutdown()
        server.server_close()
