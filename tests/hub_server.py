"""A small Hugging Face hub on the loopback, for huggingface_hub's real client: what pushing and loading models need.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("me/model")

Repositories and branches hold commits of whole file tables; large files are objects by sha256, sent by the LFS protocol.
`requests` and `received` record what was asked for and every byte that came in, and `faults` makes chosen requests fail.
Xet is not supported: set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".png", ".bin", ".pt", ".pth")
"""Endings that the hub's default .gitattributes puts into large-file storage."""
PAGE = 5
"""Files on one page of a tree: few, so that clients have to turn pages."""


@dataclass
class File:
    data: bytes
    large: bool

    @property
    def entry(self) -> dict[str, Any]:
        """As the hub's tree lists it, without its path."""
        sha256 = hashlib.sha256(self.data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(self.data)}\n"
        kept = pointer.encode() if self.large else self.data  # what git itself holds
        blob = hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()
        large = {"lfs": {"oid": sha256, "size": len(self.data), "pointerSize": len(kept)}} if self.large else {}
        return {"type": "file", "size": len(self.data), "oid": blob, **large}

    @property
    def oid(self) -> str:
        """What the hub calls the content by: sha256 of a large file, git's sha1 of another."""
        return self.entry["lfs"]["oid"] if self.large else self.entry["oid"]


@dataclass
class Commit:
    id: str
    files: dict[str, File]
    message: str = "initial commit"


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("0" * 40, {})]})

    def commit(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.id == revision), None)

    @property
    def files(self) -> dict[str, bytes]:
        """Content of main's newest commit."""
        return {name: file.data for name, file in self.branches["main"][-1].files.items()}


@dataclass
class Fault:
    """Requests whose 'METHOD /path' the pattern finds are answered `times` times with this status and error."""

    pattern: str
    status: int
    error: str = "trouble"
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class HubServer:
    """The hub; a context manager that serves from entering to leaving, on a free port."""

    def __init__(self, user: str = "me", token: str = "hf_" + "T0ken" * 7):
        self.user, self.token = user, token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.received: Counter[str] = Counter()
        """Bytes of each object (by its sha256) that ever came in."""
        self.bodies: list[tuple[str, bytes]] = []
        """Path and body of every request that is not an upload of an object."""
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, pattern: str) -> list[str]:
        """Requests so far whose 'METHOD /path' the pattern finds."""
        return [request for request in self.requests if re.search(pattern, request)]

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class Refused(Exception):
    def __init__(self, status: int, error: str, **headers: str):
        super().__init__(error)
        self.status, self.headers = status, headers


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def serve(self) -> None:
        self.path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        request = f"{self.command} {self.path}"
        with self.hub.lock:
            self.hub.requests.append(request)
        fault, body = self.hub.fault(request), self.body()
        try:
            if fault:
                raise Refused(fault.status, fault.error, **fault.headers)
            with self.hub.lock:
                status, answer, headers = self.route(self.path.strip("/").split("/"), query, body)
            self.answer(status, answer, headers)
        except Refused as refused:
            self.answer(refused.status, {"error": str(refused)}, refused.headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = serve

    def body(self) -> bytes:
        """Read the request's body, and record it."""
        length = int(self.headers.get("Content-Length") or 0)
        data = b"".join(self.chunks()) if self.headers.get("Transfer-Encoding") == "chunked" else b""
        if not data:
            data = self.rfile.read(length)
        with self.hub.lock:
            if self.path.startswith("/_objects/") and self.command == "PUT":
                self.hub.received[self.path.split("/")[2]] += len(data)
            else:
                self.hub.bodies.append((self.path, data))
        return data

    def chunks(self):
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(name, (headers or {}).pop(name, value))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # what the hub does

    def route(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str]]:
        if parts[0] == "_objects":
            return self.store(parts[1], parts[2:], body)
        if parts[:2] == ["api", "models"]:
            return self.model("/".join(parts[2:4]), parts[4:], query, body)
        if parts == ["api", "whoami-v2"]:
            self.authorize()
            return 200, {"name": self.hub.user, "type": "user", "orgs": [], "auth": {}}, {}
        if parts == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}, {}
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if len(parts) > 4 and parts[2] == "resolve":
            return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        raise Refused(404, f"no such page: {self.path}")

    def authorize(self, owner: str | None = None) -> None:
        """Only the one user's token is known, and it writes to that user's repositories only."""
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise Refused(
                401,
                "Invalid username or password.",
                **{"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        if owner not in (None, self.hub.user):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")

    def find(self, name: str, revision: str = "main") -> tuple[Repo, Commit]:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {self.hub.token}"):
            if self.headers.get("Authorization"):
                self.authorize()
            raise Refused(
                404 if self.headers.get("Authorization") else 401,
                "Repository not found",
                **{"X-Error-Code": "RepoNotFound"},
            )
        commit = repo.commit(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", **{"X-Error-Code": "RevisionNotFound"})
        return repo, commit

    def create(self, wanted: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        owner = wanted.get("organization") or self.hub.user
        self.authorize(owner)
        name = f"{owner}/{wanted['name']}"
        if name in self.hub.repos:
            return 409, {"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}, {}
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repos[name] = Repo(private)
        return 200, {"url": f"{self.hub.url}/{name}", "name": name}, {}

    def model(
        self, name: str, parts: list[str], query: dict[str, list[str]], body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        action, revision = (parts or ["revision"])[0], "main"
        if action in ("revision", "tree", "preupload", "commit") and len(parts) > 1:
            revision = parts[1]
        repo, head = self.find(name, revision)
        if self.command == "POST":
            self.authorize(name.partition("/")[0])
        if action == "branch":
            if parts[1] in repo.branches:
                raise Refused(409, "Reference already exists")
            repo.branches[parts[1]] = list(repo.branches["main"])
            return 200, {}, {}
        if action == "preupload":
            files = json.loads(body)["files"]
            return 200, {"files": [{
                "path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if large(f["path"], f["size"]) else "regular",
                "oid": head.files[f["path"]].oid if f["path"] in head.files else None,
            } for f in files]}, {}  # fmt: skip
        if action == "commit":
            return self.commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])
        if action == "tree":
            folder = "/".join(parts[2:])
            names = sorted(n for n in head.files if not folder or n.startswith(f"{folder}/"))
            if folder and not names:
                raise Refused(404, "Entry not found", **{"X-Error-Code": "EntryNotFound"})
            start = int(query.get("cursor", ["0"])[0])
            after = f"{self.hub.url}/api/models/{name}/tree/{revision}?recursive=true&cursor={start + PAGE}"
            more = {"Link": f'<{after}>; rel="next"'} if start + PAGE < len(names) else {}
            return 200, [{"path": n, **head.files[n].entry} for n in names[start : start + PAGE]], more
        if action == "revision":
            siblings = [{"rfilename": n} for n in head.files]
            facts = {"id": name, "modelId": name, "sha": head.id, "private": repo.private, "siblings": siblings}
            return 200, facts | {"tags": [], "downloads": 0, "likes": 0}, {}
        raise Refused(404, f"no such page: {self.path}")

    def commit(
        self, name: str, repo: Repo, revision: str, lines: list[dict[str, Any]]
    ) -> tuple[int, Any, dict[str, str]]:
        head, message = repo.branches[revision][-1], ""
        files = dict(head.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, f"LFS pointer to an object that was never uploaded: {value['path']}")
                files[value["path"]] = File(self.hub.objects[value["oid"]], large=True)
            else:
                raise Refused(400, f"unknown operation {line['key']}")
        sha = hashlib.sha1(json.dumps([head.id, lines]).encode()).hexdigest()
        repo.branches[revision].append(Commit(sha, files, message))
        url = f"{self.hub.url}/{name}/commit/{sha}"
        return 200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}, {}

    def batch(self, wanted: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        """Where to send each object; nothing to do for those that are here."""
        self.authorize()
        objects = []
        for item in wanted["objects"]:
            href = f"{self.hub.url}/_objects/{item['oid']}"
            here = item["oid"] in self.hub.objects
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(item if here else item | {"actions": actions})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def store(self, oid: str, parts: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Store an object, or say whether it is there."""
        if parts == ["verify"]:
            if len(self.hub.objects.get(oid, b"")) != json.loads(body)["size"]:
                raise Refused(400, "object is not here")
            return 200, {}, {}
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "sha256 does not match")
        self.hub.objects[oid] = body
        return 200, {}, {}

    def resolve(self, name: str, revision: str, file: str) -> tuple[int, Any, dict[str, str]]:
        _, head = self.find(name, revision)
        if file not in head.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": head.id}
            raise Refused(404, "Entry not found", **headers)
        found = head.files[file]
        headers = {"X-Repo-Commit": head.id, "ETag": f'"{found.oid}"', "Content-Type": "application/octet-stream"}
        return 200, found.data, headers


def large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > 10_000_000
