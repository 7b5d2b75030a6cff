"""A hub on the loopback interface: what huggingface_hub asks for, answered as huggingface.co does.

A repository is a set of folders, one a commit. Weights are handed out by redirection to a signed
address on another host, as the real hub's are.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

_LARGE = (".safetensors", ".bin")  # kept outside git, by sha256
SIGNATURE = "Signature-that-opens-a-file"


@dataclass
class Repository:
    """gated: None, "files" (its listing is public, as a gated model's is) or "all"."""

    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit
    commits: dict[str, Path] = field(default_factory=dict)
    gated: str | None = None
    members: tuple[str, ...] = ()  # the tokens that open it, if it is gated

    def commit(self, folder: Path, *refs: str) -> str:
        """Add `folder` as a commit that the branches and tags `refs` point to from now on."""
        files = sorted(file for file in folder.iterdir())
        text = "".join(f"{file.name} {_blob(file)}\n" for file in files)
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = folder
        self.refs.update(dict.fromkeys(refs, commit))
        return commit


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # without the query
    range: str | None
    token: str | None

    @property
    def file(self) -> str:
        return self.path.rpartition("/")[2]


class Hub:
    """The server; `cuts[file]` are the bytes after which it hangs up on each next GET of `file`."""

    def __init__(self):
        self.repositories: dict[str, Repository] = defaultdict(Repository)
        self.requests: list[Request] = []
        self.cuts: dict[str, list[int]] = defaultdict(list)
        # repository -> how many of its requests are answered, before it only holds the connection
        self.answers: dict[str, int] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop: from now on nothing listens on the port."""
        self.server.shutdown()
        self.server.server_close()

    def take(self) -> list[Request]:
        """The requests since the last call."""
        taken, self.requests = self.requests, []
        return taken


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        if named := re.search(r"org/[a-z]+", path):
            left = self.hub.answers.get(named[0])
            if left is not None:
                self.hub.answers[named[0]] = left - 1
                if left <= 0:
                    time.sleep(60)
                    return
        if at := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]+)/([^/]+)", path):
            if SIGNATURE not in self.path:
                return self._send(403)
            folder = self.hub.repositories[at[1]].commits[at[2]]
            return self._send_file(folder / at[3], {})
        if at := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path):
            name, what, revision = at[1], at[2], unquote(at[3] or "main")
        elif at := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)", path):
            name, what, revision = at[1], "file", unquote(at[2])
        else:
            return self._send(404)
        if name not in self.hub.repositories:
            # To a stranger the hub does not say whether a repository is private or is not there.
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        repository = self.hub.repositories[name]
        closed = repository.gated == "all" or (repository.gated and what == "file")
        if closed and token not in repository.members:
            message = f"Access to model {name} is restricted."
            return self._refuse(403 if token else 401, "GatedRepo", message)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folder = repository.commits[commit]
        files = sorted(folder.iterdir())
        if what == "tree":
            return self._send_json([_listed(file) for file in files])
        if what != "file":
            siblings = [{"rfilename": file.name} for file in files]
            return self._send_json({"id": name, "sha": commit, "siblings": siblings})
        file = folder / at[3]
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob(file)}"'}
        if file.suffix not in _LARGE:
            return self._send_file(file, headers)
        self._send(
            302,
            **headers,
            X_Linked_ETag=headers["ETag"],
            X_Linked_Size=str(file.stat().st_size),
            Location=f"http://localhost:{self.hub.port}/cdn/{name}/{commit}/{quote(file.name)}"
            f"?signature={SIGNATURE}",
        )

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, X_Error_Code=code, X_Error_Message=message)

    def _send_json(self, value) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _send_file(self, file: Path, headers: dict[str, str]) -> None:
        content = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if asked:
            headers = {
                **headers,
                "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
            }
        cut = None
        if self.command == "GET" and self.hub.cuts[file.name]:
            cut = self.hub.cuts[file.name].pop(0)
        self._send(206 if asked else 200, content[start:], cut, **headers)

    def _send(self, status: int, body: bytes = b"", cut: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _blob(file: Path) -> str:
    """What the hub calls a file's content: sha256 of a large one, git's sha1 of any other."""
    content = file.read_bytes()
    if file.suffix in _LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _listed(file: Path) -> dict:
    size = file.stat().st_size
    listed = {"type": "file", "path": file.name, "size": size, "oid": _blob(file)}
    if file.suffix in _LARGE:
        listed["lfs"] = {"oid": _blob(file), "size": size, "pointerSize": 134}
    return listed
