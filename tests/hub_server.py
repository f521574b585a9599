"""A Hub in memory, on 127.0.0.1: enough of its HTTP interface for the real `huggingface_hub` to work against it.

    with HubServer() as hub:
        hub.add("org/repo", {"adapter_config.json": b"{}"})
        subprocess.run([...], env={**os.environ, **hub.env(tmp_path)})
        assert hub.files("org/repo") == {...}
        assert not hub.asked("PUT|POST")

`huggingface_hub` reads HF_ENDPOINT and its other variables when it is imported, so that code under test runs in a
subprocess with `hub.env(...)`. Reading of public repositories needs no token; everything else needs one of
`hub.tokens`. Knows branches, tags, pull requests, private and gated repositories, large files (LFS) and ranges; it
does not know Xet, data sets, Spaces or paging.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"
SLICE = 1 << 20


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and what it may do."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    def owns(self, repo: str) -> bool:
        return repo.split("/")[0] in (self.name, *self.orgs)


@dataclass(frozen=True)
class Blob:
    """The content of a file, with the two hashes that the Hub knows it by."""

    data: bytes
    lfs: bool
    oid: str
    sha256: str

    @classmethod
    def of(cls, data: bytes, *, lfs: bool = False) -> Blob:
        oid = hashlib.sha1(b"blob %d\0" % len(data))
        oid.update(data)
        return cls(data, lfs, oid.hexdigest(), hashlib.sha256(data).hexdigest())

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def listing(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Repo:
    """A model repository: commits by sha, and the names that point to them."""

    id: str
    private: bool = False
    gated: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str, files: dict[str, Blob], message: str) -> str:
        """Make `files` the whole content of `revision`, a branch or pull request."""
        head = self.sha(revision)
        text = json.dumps([self.id, head, len(self.commits), sorted((p, b.oid) for p, b in files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.messages[sha] = files, message
        names = self.pull_requests if revision.startswith("refs/pr/") else self.branches
        names[revision] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        for names in (self.branches, self.tags, self.pull_requests):
            if revision in names:
                return names[revision]
        return revision if revision in self.commits else None


class HubServer:
    """A running Hub; use it as a context manager.

    Args:
        tokens: token to account. By default `hf_test` belongs to `tester`, who is in the organization `org`.
        lfs_from: files of this many bytes or more are uploaded as large files; by default none is.
    """

    def __init__(self, tokens: Mapping[str, Account] | None = None, *, lfs_from: int | None = None) -> None:
        self.tokens = dict(tokens) if tokens is not None else {TOKEN: Account("tester", ("org",))}
        self.lfs_from = lfs_from
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        #: Every request as "METHOD /path", in the order of arrival.
        self.requests: list[str] = []
        #: When set, every request is answered with this status, as by a Hub that is down.
        self.status: int | None = None
        #: Called with every request before it is answered.
        self.watch: Callable[[str], object] = lambda request: None
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def env(self, home: Path, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Return the environment for a subprocess: this Hub, a cache in `home`, nothing of the user's."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
        kept.pop("TRANSFORMERS_OFFLINE", None)
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        kept |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
        kept |= {"HF_HUB_ETAG_TIMEOUT": "600", "HF_HUB_DOWNLOAD_TIMEOUT": "600"}  # a busy machine is no Hub that is down
        kept |= {"HF_TOKEN": token} if token is not None else {}
        return kept | ({"HF_HUB_OFFLINE": "1"} if offline else {})

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
        message: str = "add",
    ) -> str:
        """Add files to a branch of a repository, both made when missing, and return the commit."""
        with self.lock:
            held = self.repos.setdefault(repo, Repo(repo, private=private, gated=gated))
            if not held.branches:
                held.commit("main", {}, "initial commit")
            before = held.commits[held.sha(revision) or held.branches["main"]]
            return held.commit(revision, before | {path: self._blob(data) for path, data in files.items()}, message)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return what a revision holds."""
        held = self.repos[repo]
        return {path: blob.data for path, blob in held.commits[held.sha(revision) or ""].items()}

    def asked(self, pattern: str) -> list[str]:
        """Return the requests so far that hold a match of `pattern`."""
        return [request for request in self.requests if re.search(pattern, request)]

    def _blob(self, data: bytes) -> Blob:
        return Blob.of(data, lfs=self.lfs_from is not None and len(data) >= self.lfs_from)


class _Refused(Exception):
    """An answer other than success, in the shape in which `huggingface_hub` reads it."""

    def __init__(self, status: int, code: str = "", message: str = "", body: Any = None) -> None:
        self.status, self.code, self.message = status, code, message
        self.body = body if body is not None else {"error": message or code}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100  # downloads come in parallel, and a busy machine takes a while to accept them
    hub: HubServer

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may leave at any time
            super().handle_error(request, client_address)


ID = r"(?P<id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, re.Pattern[str], str]] = [
    (method, re.compile(pattern), handler)
    for method, pattern, handler in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("GET", rf"/api/models/{ID}", "info"),
        ("GET", rf"/api/models/{ID}/revision/(?P<rev>[^/]+)", "info"),
        ("GET", rf"/api/models/{ID}/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("GET", rf"/api/models/{ID}/refs", "refs"),
        ("POST", rf"/api/models/{ID}/paths-info/(?P<rev>[^/]+)", "paths"),
        ("POST", rf"/api/models/{ID}/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{ID}/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", rf"/api/models/{ID}/branch/(?P<name>[^/]+)", "branch"),
        ("POST", rf"/api/models/{ID}/tag/(?P<rev>[^/]+)", "tag"),
        ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("GET", r"/api/models/(?P<id>[^/]+)(?:/.*)?", "ownerless"),
        ("HEAD", rf"/{ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", rf"/{ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.read_body()
        request = f"{self.command} {unquote(url.path)}"
        hub.requests.append(request)
        hub.watch(request)
        try:
            if hub.status is not None:
                raise _Refused(hub.status, message="down")
            self.account = self.who()
            for method, pattern, name in ROUTES:
                if method == self.command and (match := pattern.fullmatch(url.path)):
                    handler: Callable[..., Any] = getattr(self, name)
                    result = handler(**{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
                    break
            else:
                raise _Refused(404, message=f"no such endpoint: {self.command} {url.path}")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.send_json(refused.body, refused.status, {k: v for k, v in headers.items() if v})
        else:
            if result is not None:
                self.send_json(result)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def send_json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_bytes(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_bytes(self, data: bytes | memoryview, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, len(data), SLICE):
                self.wfile.write(data[start : start + SLICE])

    # Who may do what.

    def who(self) -> Account | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        account = self.server.hub.tokens.get(header.removeprefix("Bearer "))
        if account is None:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return account

    def repo(self, name: str, *, write: bool = False) -> Repo:
        repo = self.server.hub.repos.get(name)
        mine = self.account is not None and self.account.owns(name)
        if repo is None or (repo.private and not mine):
            # As the Hub does: strangers do not learn whether a repository exists.
            if self.account is None:
                raise _Refused(401, "RepoNotFound", "Invalid username or password.")
            raise _Refused(404, "RepoNotFound", "Repository not found")
        if write:
            self.writer(name)
        return repo

    def writer(self, name: str) -> None:
        if self.account is None:
            raise _Refused(401, message="Invalid username or password.")
        if self.account.role != "write" or not self.account.owns(name):
            raise _Refused(403, message=f"You don't have the rights to write to {name}")

    def sha(self, repo: Repo, revision: str) -> str:
        sha = repo.sha(revision)
        if sha is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # Accounts and repositories.

    def whoami(self) -> Any:
        if self.account is None:
            raise _Refused(401, message="Invalid username or password.")
        token = {"displayName": "test", "role": self.account.role}
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in self.account.orgs]
        return {"type": "user", "name": self.account.name, "orgs": orgs, "auth": {"accessToken": token}}

    def validate(self) -> Any:
        if json.loads(self.body)["content"].startswith("---\n!"):
            raise _Refused(400, body={"errors": [{"message": "bad metadata"}]})
        return {"errors": [], "warnings": []}

    def create(self) -> Any:
        asked = json.loads(self.body)
        owner = asked.get("organization") or (self.account.name if self.account else "")
        name = f"{owner}/{asked['name']}"
        self.writer(name)
        hub = self.server.hub
        url = {"url": f"{hub.url}/{name}", "name": name}
        with hub.lock:
            if name in hub.repos:
                raise _Refused(409, message="You already created this model repo", body=url)
            repo = hub.repos[name] = Repo(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
            repo.commit("main", {}, "initial commit")
        return url

    def delete(self) -> Any:
        asked = json.loads(self.body)
        owner = asked.get("organization") or (self.account.name if self.account else "")
        repo = self.repo(f"{owner}/{asked['name']}", write=True)
        del self.server.hub.repos[repo.id]
        return {}

    def info(self, id: str, rev: str = "main") -> Any:
        repo = self.repo(id)
        sha = self.sha(repo, rev)
        return {
            "_id": repo.id,
            "id": repo.id,
            "modelId": repo.id,
            "sha": sha,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "cardData": repo.card,
            "siblings": [{"rfilename": path} for path in sorted(repo.commits[sha])],
        }

    def ownerless(self, id: str) -> Any:
        self.repo(id)  # this Hub has no repositories without an owner
        raise _Refused(404, message="no such endpoint")

    def tree(self, id: str, rev: str, path: str = "") -> Any:
        repo = self.repo(id)
        files = repo.commits[self.sha(repo, rev)]
        top = f"{path}/" if path else ""
        inside = {name: blob for name, blob in files.items() if name.startswith(top)}
        if path and not inside:
            raise _Refused(404, "EntryNotFound", f"{path} does not exist")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        folders = {top + "/".join(parts[:n]) for parts in _below(inside, top) for n in range(1, len(parts))}
        entries = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        entries += [blob.listing(name) for name, blob in sorted(inside.items())]
        return [entry for entry in entries if deep or "/" not in entry["path"].removeprefix(top)]

    def paths(self, id: str, rev: str) -> Any:
        repo = self.repo(id)
        files = repo.commits[self.sha(repo, rev)]
        try:
            asked = json.loads(self.body)["paths"]
        except ValueError:
            asked = parse_qs(self.body.decode())["paths"]
        return [files[path].listing(path) for path in asked if path in files]

    def refs(self, id: str) -> Any:
        repo = self.repo(id)

        def listed(names: Mapping[str, str], prefix: str) -> Any:
            return [{"name": n, "ref": prefix + n, "targetCommit": sha} for n, sha in sorted(names.items())]

        return {
            "branches": listed(repo.branches, "refs/heads/"),
            "tags": listed(repo.tags, "refs/tags/"),
            "converts": [],
            "pullRequests": listed(repo.pull_requests, ""),
        }

    def branch(self, id: str, name: str) -> Any:
        repo = self.repo(id, write=True)
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        with self.server.hub.lock:
            if name in repo.branches:
                raise _Refused(409, message="Reference already exists")
            repo.branches[name] = self.sha(repo, start)
        return {}

    def tag(self, id: str, rev: str) -> Any:
        repo = self.repo(id, write=True)
        name = json.loads(self.body)["tag"]
        with self.server.hub.lock:
            if name in repo.tags:
                raise _Refused(409, message="Tag reference exists already")
            repo.tags[name] = self.sha(repo, rev)
        return {}

    # Upload.

    def preupload(self, id: str, rev: str) -> Any:
        repo = self.repo(id, write=True)
        files = repo.commits[self.sha(repo, rev)]
        limit = self.server.hub.lfs_from
        answers = []
        for file in json.loads(self.body)["files"]:
            large = limit is not None and file["size"] >= limit
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            held = files.get(file["path"])
            answers.append(answer | ({"oid": held.etag} if held is not None and held.lfs == large else {}))
        return {"files": answers}

    def lfs_batch(self, id: str) -> Any:
        self.repo(id, write=True)
        hub = self.server.hub
        objects: list[dict[str, Any]] = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in hub.large:
                entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message="the content does not have this sha256")
        self.server.hub.large[oid] = self.body
        return {}

    def commit(self, id: str, rev: str) -> Any:
        repo, hub = self.repo(id, write=True), self.server.hub
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        with hub.lock:
            files = dict(repo.commits[self.sha(repo, rev)])
            message = ""
            for line in lines:
                message = line["value"]["summary"] if line["key"] == "header" else message
                self.apply(line["key"], line["value"], files)
            pull = self.query.get("create_pr") == ["1"]
            target = f"refs/pr/{len(repo.pull_requests) + 1}" if pull else rev
            sha = repo.commit(target, files, message)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{id}/commit/{sha}", "hookOutput": ""}
        return answer | ({"pullRequestUrl": f"{hub.url}/{id}/discussions/{target.split('/')[-1]}"} if pull else {})

    def apply(self, key: str, value: dict[str, Any], files: dict[str, Blob]) -> None:
        if key == "file":
            files[value["path"]] = Blob.of(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.server.hub.large:
                raise _Refused(400, message=f"the large file {value['path']} was never uploaded")
            files[value["path"]] = Blob.of(self.server.hub.large[value["oid"]], lfs=True)
        elif key == "deletedFile":
            files.pop(value["path"], None)
        elif key == "deletedFolder":
            top = value["path"].rstrip("/") + "/"
            for path in [path for path in files if path.startswith(top)]:
                del files[path]

    # Download.

    def resolve(self, id: str, rev: str, path: str) -> None:
        repo = self.repo(id)
        if repo.gated and (self.account is None or not self.account.owns(id)):
            raise _Refused(401 if self.account is None else 403, "GatedRepo", f"Access to model {id} is restricted")
        sha = self.sha(repo, rev)
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        data, status = memoryview(blob.data), 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        self.send_bytes(data, status, headers)


def _below(paths: Iterable[str], top: str) -> list[list[str]]:
    return [path.removeprefix(top).split("/") for path in paths]
