"""A hub on the loopback interface: the endpoints its client uses, over files kept in memory.

Not a mock of the client: huggingface_hub itself runs against it, requests, headers, redirects to
the cache and all. Repositories are ``{branch: {file name: bytes}}``; a branch's commit is a hash of
its files, so the same contents have the same commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"


@dataclass
class Repo:
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    private: bool = False
    gated: bool = False

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return (commit, files) of a branch or a commit."""
        for branch, files in self.branches.items():
            if revision in (branch, commit_of(files)):
                return commit_of(files), files
        return None


def commit_of(files: dict[str, bytes]) -> str:
    total = hashlib.sha1()
    for name, content in sorted(files.items()):
        total.update(f"{name}:{len(content)}:".encode() + content)
    return total.hexdigest()


class Hub:
    """The server: ``repos`` and the token that may write; ``asked`` lists every request."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.token = "hf_writer"
        self.owner = "me"
        self.asked: list[str] = []
        self.agents: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.broken: set[str] = set()  # methods that are answered with 500
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )
        self._thread.start()

    def add(self, name: str, files: dict[str, bytes], branch: str = "main", **kind: bool) -> Repo:
        repo = self.repos.setdefault(name, Repo(**kind))
        repo.branches[branch] = dict(files)
        return repo

    def stop(self) -> None:
        """Go away as an unplugged network does: the port is closed."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub  # HTTP/1.0: one request a connection, so that nothing outlives `stop`

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.state.token}":
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def _repo(self, name: str) -> Repo | None:
        repo = self.state.repos.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {self.state.token}"
        if repo is None or (repo.private and not allowed):
            self._refuse(404 if allowed else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and not allowed:
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted")
            return None
        return repo

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self._repo(name)
        found = repo.find(unquote(revision)) if repo is not None else None
        if repo is not None and found is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        self.state.asked.append(f"{self.command} {path}")
        self.state.agents.add(self.headers.get("User-Agent", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command in self.state.broken:
            self._answer(500, {"error": "Internal error"})
            return
        for pattern, method in self.routes.items():
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                method(self, body, **match.groupdict())
                return
        self._answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        found = self._found(name, revision or "main")
        if found:
            commit, files = found
            siblings = [{"rfilename": f} for f in sorted(files)]
            self._answer(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings,
                               "private": self.state.repos[name].private, "tags": []})  # fmt: skip

    def tree(self, body: bytes, name: str, revision: str) -> None:
        found = self._found(name, revision)
        if found:
            self._answer(200, [
                {"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for f, c in sorted(found[1].items())
            ])  # fmt: skip

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        found = self._found(name, revision)
        if not found:
            return
        commit, files = found
        if file not in files:
            self._refuse(404, "EntryNotFound", f"{file} does not exist")
            return
        tag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        self._answer(200, files[file], ETag=tag, X_Repo_Commit=commit)

    def create(self, body: bytes) -> None:
        if not self._may_write():
            return
        asked = json.loads(body)
        owner = asked.get("organization") or self.state.owner
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.state.url}/{name}", "name": name}
        if name in self.state.repos:
            self._answer(409, {"error": "You already created this model repo", **url})
            return
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.state.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._answer(200, url)

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if self._may_write():
            branches = self.state.repos[name].branches
            if unquote(branch) in branches:
                self._answer(409, {"error": "Reference already exists"})
                return
            branches[unquote(branch)] = dict(branches["main"])
            self._answer(200, {})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._may_write():
            self._answer(200, {"files": [
                {"path": f["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]})  # fmt: skip

    def lfs_batch(self, body: bytes, name: str) -> None:
        if self._may_write():
            self._answer(200, {"transfer": "basic", "objects": [
                {**o, "actions": {"upload": {"href": f"{self.state.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]}, Content_Type="application/vnd.git-lfs+json")  # fmt: skip

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(422, {"error": "checksum"})
            return
        self.state.uploads[oid] = body
        self._answer(200)

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        fine = re.match(r"---\n.*?\n---\n", text, re.S) is not None
        self._answer(200, {"errors": [] if fine else [{"message": "no metadata"}], "warnings": []})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not self._may_write():
            return
        files = self.state.repos[name].branches[unquote(revision)]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.state.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.uploads[value["oid"]]
        commit = commit_of(files)
        url = f"{self.state.url}/{name}/commit/{commit}"
        self._answer(200, {"commitUrl": url, "commitOid": commit, "success": True})

    routes = {
        rf"GET {MODEL}": info,
        rf"GET {MODEL}/revision/(?P<revision>[^/]+)": info,
        rf"GET {MODEL}/tree/(?P<revision>[^/]+)": tree,
        r"(?:GET|HEAD) /(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)": resolve,
        r"POST /api/repos/create": create,
        rf"POST {MODEL}/branch/(?P<branch>[^/]+)": branch,
        rf"POST {MODEL}/preupload/(?P<revision>[^/]+)": preupload,
        rf"POST {MODEL}/commit/(?P<revision>[^/]+)": commit,
        r"POST /api/validate-yaml": validate,
        r"POST /(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch": lfs_batch,
        r"PUT /lfs/(?P<oid>[0-9a-f]+)": lfs_put,
    }
