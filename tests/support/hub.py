"""A stand-in for the Hugging Face Hub on this machine: the part of its HTTP interface that its client uses.

Repositories are in memory. Files other than text are LFS objects, which another origin serves, as on the Hub. The
server counts the bytes that it sends, records the requests, and can misbehave.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standInTokenOfTheTests"
USER = "user"
_TEXT = (".md", ".json", ".txt", ".jinja", ".gitattributes")
_PART = 1 << 16  # bytes that are sent at a time


@dataclass
class Repo:
    """A repository.

    Attributes:
        private: Whether it needs a token.
        gated: Whether it needs conditions to be accepted, which nobody has.
        commits: Commit -> path -> content.
        refs: Branch -> commit.
    """

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add files to a branch, and return the commit."""
        parent = self.refs.get(branch)
        whole = {**(self.commits[parent] if parent else {}), **files}
        text = f"{parent}{branch}{len(self.commits)}{sorted((name, len(data)) for name, data in whole.items())}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.refs[branch] = whole, oid
        return oid

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit that a revision is, and its files."""
        oid = self.refs.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class Files:
    """A base, a fine-tune and two vectors of it.

    Attributes:
        folder: The folder of all of them.
        base: A model.
        tuned: A fine-tune of it.
        vectors: Vectors of it, `one.lota` and `two.lota`.
    """

    folder: Path
    base: Path
    tuned: Path
    vectors: list[Path]


class Hold:
    """Requests that wait, so that the moment of a kill is known.

    Args:
        method: The method of the requests.
        path: A regular expression that the beginning of their paths matches.
        after: The number of bytes of the body that are sent, or received, before the wait.

    Attributes:
        arrived: Set when a request waits.
        released: Set it to let all requests go on.
    """

    def __init__(self, method: str, path: str, after: int = 0) -> None:
        self.method, self.path, self.after = method, re.compile(path), after
        self.arrived, self.released = threading.Event(), threading.Event()

    def matches(self, method: str, path: str) -> bool:
        """Return whether a request waits."""
        return not self.released.is_set() and self.method == method and self.path.match(path) is not None

    def wait(self) -> None:
        """Wait in a request."""
        self.arrived.set()
        self.released.wait(60)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Print nothing: connections of killed clients are reset."""


class Hub:
    """The server. It is closed at the end of a `with` block.

    Attributes:
        repos: Name -> repository.
        renamed: Old name -> new name of a repository.
        sent: Bytes of the bodies of files that were sent.
        requests: Method and path of each request.
        authorized: Origins that got a token: "hub", "storage".
        hold: Requests that wait, or None.
        before: Called with the method and the path before each request is answered.
        answer: Called with the method, the path, and the body of an answer with a file, which it may change.
        ignores_ranges: Whether the whole file is sent if a range is asked for.
        cuts: The number of answers with a file that end in the middle.
        status: A status that is answered to every request for a file, or None.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.authorized: set[str] = set()
        self.sent = 0
        self.hold: Hold | None = None
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.answer: Callable[[str, str, bytes], bytes] = lambda method, path, data: data
        self.ignores_ranges = False
        self.cuts = 0
        self.status: int | None = None
        self.lock = threading.Lock()
        hub = self

        class Bound(_Handler):
            server_hub = hub

        self._server = _Server(("127.0.0.1", 0), Bound)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.hold:
            self.hold.released.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, bytes] | None = None, **facts: bool) -> str:
        """Add files to the main branch of a repository, which is created, and return the commit."""
        repo = self.repos.setdefault(name, Repo(**facts))
        return repo.commit(files or {".gitattributes": b""})

    def add_folder(self, name: str, folder: Path) -> str:
        """Add the files of a folder to a repository, and return the commit."""
        return self.add(name, {file.name: file.read_bytes() for file in sorted(folder.iterdir())})

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Return the environment of a process that uses this server, with its cache in `home`."""
        own = ("HF_", "HUGGING_FACE", "HUGGINGFACE")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        more = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1"}
        more |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({} if token is None else {"HF_TOKEN": token})
        return {**kept, **more}

    @contextmanager
    def holding(self, method: str, path: str, after: int = 0) -> Iterator[Hold]:
        """Let the requests of a kind wait during a `with` block."""
        self.hold = Hold(method, path, after)
        try:
            yield self.hold
        finally:
            self.hold.released.set()
            self.hold = None


_PROGRAM = """
import json, sys
from support.commands import inside

for words in json.loads(sys.argv[1]):
    done = inside(*words)
    print(json.dumps([done.returncode, done.stdout, done.stderr]), flush=True)
"""


def run_all(
    environment: Mapping[str, str], *commands: Sequence[object], cwd: Path
) -> list[subprocess.CompletedProcess[str]]:
    """Run several commands in one new process, because huggingface_hub reads the environment when it is imported.

    Args:
        environment: The environment, from `Hub.environment`.
        commands: The words of each command, without `taskvec`.
        cwd: The folder to run them in.
    """
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = python(environment, _PROGRAM, words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [
        subprocess.CompletedProcess(list(map(str, command)), *each)
        for command, each in zip(commands, found, strict=True)
    ]


def python(
    environment: Mapping[str, str], program: str, *arguments: str, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a new process, with the modules that this process finds."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._handle("HEAD")

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        hub.requests.append((method, path))
        storage = path.startswith("/storage/")
        if self.headers.get("Authorization"):
            hub.authorized.add("storage" if storage else "hub")
        body = self._body(method, path)
        hub.before(method, path)
        try:
            if storage:
                self._storage(method, path.removeprefix("/storage/"), body)
            elif path.startswith("/api/"):
                self._api(path.removeprefix("/api/"), body)
            elif path.endswith("/info/lfs/objects/batch"):
                self._batch(json.loads(body))
            else:
                self._resolve(path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed

    def _body(self, method: str, path: str) -> bytes:
        length, hold = int(self.headers.get("Content-Length") or 0), self.server_hub.hold
        if method in ("PUT", "POST") and hold is not None and hold.matches(method, path):
            first = self.rfile.read(min(hold.after, length))
            hold.wait()
            return first + self.rfile.read(length - len(first))
        return self.rfile.read(length)

    # answers

    def _send(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, document: object, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str, message: str, **headers: str) -> None:
        self._send(
            status, json.dumps({"error": message}).encode(), X_Error_Code=code, X_Error_Message=message, **headers
        )

    def _may(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str) -> Repo | None:
        """Return a repository that the client may read; answer with an error otherwise."""
        hub = self.server_hub
        if name in hub.renamed:
            self._send(307, Location=self.path.replace(name, hub.renamed[name], 1))
            return None
        repo = hub.repos.get(name)
        if self.headers.get("Authorization") and not self._may():
            self._send(401, b"{}", X_Error_Message="Invalid credentials in Authorization header")
        elif repo is None or (repo.private and not self._may()):
            self._error(404 if self._may() else 401, "RepoNotFound", "Repository not found")
        elif repo.gated:
            self._error(403, "GatedRepo", "Access to the model is restricted")
        else:
            return repo
        return None

    # the interface for repositories

    def _api(self, path: str, body: bytes) -> None:
        if path == "whoami-v2":
            self._json({"type": "user", "name": USER, "auth": {"type": "access_token"}})
        elif path == "validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"models/([^/]+/[^/]+)(?:/([a-z]+)(?:/(.*))?)?", path):
            name, action, rest = match.groups()
            repo = self._repo(name)
            if repo is not None:
                self._of_repo(name, repo, action or "revision", rest or "main", body)
        else:
            self._error(404, "", "no such interface")

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not self._may():
            self._send(401, b"{}", X_Error_Message="Invalid credentials in Authorization header")
        elif name in self.server_hub.repos:
            self._json({"error": "exists", "url": f"{self.server_hub.url}/{name}"}, 409)
        elif not name.startswith(f"{USER}/"):
            self._error(403, "", "You don't have the rights to create a model under this namespace")
        else:
            self.server_hub.add(name, private=bool(asked.get("private") or asked.get("visibility") == "private"))
            self._json({"url": f"{self.server_hub.url}/{name}"})

    def _of_repo(self, name: str, repo: Repo, action: str, rest: str, body: bytes) -> None:
        if self.command == "POST" and not self._may():
            self._send(401, b"{}", X_Error_Message="Invalid credentials in Authorization header")
            return
        if action == "branch":
            repo.refs[rest] = repo.refs["main"]
            self._json({})
            return
        revision, _, below = (rest, "", "") if action != "tree" else rest.partition("/")
        found = repo.files(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        oid, files = found
        if action == "revision":
            siblings = [{"rfilename": file} for file in files]
            self._json(
                {"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}
            )
        elif action == "tree":
            self._json([self._entry(path, data) for path, data in files.items() if path.startswith(below)])
        elif action == "preupload":
            self._json({"files": [self._mode(each, files) for each in json.loads(body)["files"]]})
        elif action == "commit":
            self._commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
        if _is_lfs(path):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _mode(self, asked: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        path, lfs = asked["path"], _is_lfs(asked["path"])
        found = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if path in files:
            found["oid"] = hashlib.sha256(files[path]).hexdigest() if lfs else _git_oid(files[path])
        return found

    def _commit(self, name: str, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> None:
        hub, added = self.server_hub, {}
        with hub.lock:
            for line in lines:
                value = line["value"]
                if line["key"] == "header" and value.get("parentCommit", repo.refs[branch]) != repo.refs[branch]:
                    self._error(412, "", "A commit has happened since. Please refresh and try again.")
                    return
                if line["key"] == "file":
                    added[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    added[value["path"]] = hub.objects[value["oid"]]
            request = "create_pr" in parse_qs(urlsplit(self.path).query)
            if request:
                repo.refs["refs/pr/1"] = repo.refs[branch]
            oid = repo.commit(added, "refs/pr/1" if request else branch)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}", "hookOutput": ""}
        self._json(answer | ({"pullRequestUrl": f"{hub.url}/{name}/discussions/1"} if request else {}))

    def _batch(self, asked: dict[str, Any]) -> None:
        hub, objects = self.server_hub, []
        for each in asked["objects"]:
            upload = {"href": f"{hub.url}/storage/{each['oid']}?signature=secretOfTheUrl"}
            objects.append({**each, **({} if each["oid"] in hub.objects else {"actions": {"upload": upload}})})
        self._json({"transfer": "basic", "objects": objects})

    # files

    def _storage(self, method: str, oid: str, body: bytes) -> None:
        hub = self.server_hub
        if method == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                self._send(400, b"the content has another digest")
                return
            hub.objects[oid] = body
            self._send(200)
            return
        self._file(f"/storage/{oid}", hub.objects[oid], ETag=f'"{oid}"')

    def _resolve(self, path: str) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.*)", path)
        repo = self._repo(match[1]) if match else None
        if match is None:
            self._error(404, "", "no such page")
        elif repo is not None:
            found = repo.files(match[2])
            if found is None:
                self._error(404, "RevisionNotFound", f"Invalid rev id: {match[2]}")
            elif match[3] not in found[1]:
                self._error(404, "EntryNotFound", "Entry not found", X_Repo_Commit=found[0])
            else:
                self._content(found[0], match[3], found[1][match[3]], path)

    def _content(self, commit: str, name: str, data: bytes, path: str) -> None:
        hub = self.server_hub
        if hub.status is not None:
            self._send(hub.status)
        elif _is_lfs(name):
            oid = hashlib.sha256(data).hexdigest()
            hub.objects.setdefault(oid, data)
            # another origin, as the storage of the Hub
            self._send(
                302,
                Location=f"http://localhost:{hub.port}/storage/{oid}?signature=secretOfTheUrl",
                X_Repo_Commit=commit,
                X_Linked_Size=str(len(data)),
                X_Linked_ETag=f'"{oid}"',
            )
        else:
            self._file(path, data, X_Repo_Commit=commit, ETag=f'"{_git_oid(data)}"')

    def _file(self, path: str, data: bytes, **headers: str) -> None:
        hub, asked = self.server_hub, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        whole = hub.answer(self.command, path, data)
        status, start, stop = 200, 0, len(whole)
        if asked and not hub.ignores_ranges:
            status, start = 206, int(asked[1])
            stop = min(stop, int(asked[2]) + 1 if asked[2] else stop)
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(whole)}"
        self._send(status, Content_Length=str(stop - start), Accept_Ranges="bytes", **headers)
        if self.command == "HEAD":
            return
        hold, sent = hub.hold, start
        if hub.cuts and not path.endswith(_TEXT):
            hub.cuts -= 1
            self.close_connection = True
            stop = (start + stop) // 2
        while sent < stop:
            if hold is not None and hold.matches(self.command, path) and sent - start >= hold.after:
                self.wfile.flush()
                hold.wait()
            part = whole[sent : min(sent + _PART, stop)]
            self.wfile.write(part)
            sent += len(part)
            with hub.lock:
                hub.sent += len(part)


def _is_lfs(name: str) -> bool:
    return not name.endswith(_TEXT)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
