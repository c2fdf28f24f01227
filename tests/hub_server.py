"""A small Hugging Face hub on this machine, with the answers that the real one gives to the libraries that ask it.

It serves folders as repositories. As the real one it answers 401 for what does not exist to who is not logged in, 404 to who is,
401 with `GatedRepo` or 403 for a gated repository, 401 for a token that was revoked, whatever is asked for; it sends small
files from a place of its own (307) and large ones from another host name (302), lists trees in pages, and names a commit.
"""

import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

MEMBER, STRANGER, REVOKED = "hf_member", "hf_stranger", "hf_revoked"  # tokens: admitted to gated repositories, not, known no more
LARGE = (".safetensors", ".parquet", ".jsonl")  # kept as large files, which have another ETag and lie elsewhere
_QUESTIONS = ("revision", "refs", "paths-info", "tree")  # about a repository
PAGE = 3  # entries of a tree in one answer; 1,000 on the real hub


@dataclass
class Repository:
    """A folder under an id."""

    id: str
    kind: str  # "models" or "datasets"
    folder: Path
    gated: bool = False
    private: bool = False
    branches: tuple[str, ...] = ("main",)

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1(f"{self.kind}/{self.id}".encode()).hexdigest()

    @cached_property
    def files(self) -> dict[str, Path]:
        return {str(path.relative_to(self.folder)): path for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def entry(self, name: str) -> dict[str, object]:
        """A file as trees list it."""
        content = self.files[name].read_bytes()
        entry: dict[str, object] = {"type": "file", "oid": git_hash(content), "size": len(content), "path": name}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def tree(self, under: str, recursive: bool) -> list[dict[str, object]] | None:
        """Files and folders below a folder; None where there is no such folder."""
        inside = {name: name.removeprefix(f"{under}/") if under else name for name in self.files}
        inside = {name: rest for name, rest in inside.items() if not under or rest != name}
        folders = {f"{under}/{part}".lstrip("/") for part in {rest.split("/")[0] for rest in inside.values() if "/" in rest}}
        entries: list[dict[str, object]] = [
            {"type": "directory", "oid": git_hash(name.encode()), "size": 0, "path": name} for name in sorted(folders)
        ]
        entries += [self.entry(name) for name, rest in inside.items() if recursive or "/" not in rest]
        return entries if entries or not under else None


@dataclass
class Hub:
    """The server, in a thread of its own; `requests` is what it was asked, as "METHOD /path"."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    connections: set[socket.socket] = field(default_factory=set)

    def add(self, id: str, kind: str, folder: Path, **more: object) -> None:
        self.repositories[kind, id] = Repository(id, kind, folder, **more)  # type: ignore[arg-type]

    def start(self, port: int = 0) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        """No network: connections are refused from here on, those that are open end."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def weights_asked(self, since: int = 0) -> list[str]:
        """Requests for weights, from the so-manieth request on."""
        return [request for request in self.requests[since:] if ".safetensors" in request and "index.json" not in request]


def git_hash(content: bytes) -> str:
    """Of a file, as git names it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.hub.connections.add(self.request)
        super().setup()

    def finish(self) -> None:
        self.hub.connections.discard(self.request)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.form = parse_qs(self.rfile.read(length).decode()) if length else {}
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.hub.requests.append(f"{self.command} {self.path}")
        try:
            status, headers, body = self._route([unquote(part) for part in url.path.strip("/").split("/")])
        except RefusalError as refusal:
            body = json.dumps({"error": str(refusal)}).encode()
            status, headers = refusal.status, {"X-Error-Message": str(refusal), "Content-Type": "application/json"}
            if refusal.code is not None:
                headers["X-Error-Code"] = refusal.code
            if refusal.status == 401:
                headers["WWW-Authenticate"] = 'Bearer realm="Authentication required", charset="UTF-8"'
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Request-Id": "Root=1-hub", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET  # noqa: N815 (names that the server asks for)

    def _route(self, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if parts[0] == "cdn":  # signed addresses, which need no token
            return self._content(self.hub.repositories[parts[1], f"{parts[2]}/{parts[3]}"].files["/".join(parts[4:])], {})
        if token and token not in (MEMBER, STRANGER):
            raise RefusalError(401, "Invalid credentials in Authorization header")
        if parts == ["api", "whoami-v2"]:
            if not token:
                raise RefusalError(401, "Invalid username or password.")
            return _json({"type": "user", "name": token, "orgs": []})
        if parts[0] == "api" and parts[1] == "resolve-cache":
            repository = self._repository(parts[2], "/".join(parts[3:5]), token)
            return self._content(repository.files["/".join(parts[6:])], _etag(repository, "/".join(parts[6:])))
        if parts[0] == "api" and parts[1] in ("models", "datasets"):
            at = 3 if parts[3:4] and parts[3] in _QUESTIONS else 4
            return self._api(self._repository(parts[1], "/".join(parts[2:at]), token), parts[at:])
        kind, rest = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts)
        if "resolve" in rest[1:3]:  # some ids have no owner
            at = rest.index("resolve", 1)
            repository = self._repository(kind, "/".join(rest[:at]), token)
            return self._resolve(repository, rest[at + 1], "/".join(rest[at + 2 :]), token)
        raise RefusalError(404, "Sorry, we can't find the page you are looking for.")

    def _repository(self, kind: str, id: str, token: str) -> Repository:
        repository = self.hub.repositories.get((kind, id))
        if repository is None or (repository.private and token != MEMBER):
            if not token:
                raise RefusalError(401, "Invalid username or password.")  # without a code
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return repository

    def _api(self, repository: Repository, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if not rest or rest[0] == "revision":
            self._check_revision(repository, rest[1] if rest else "main")
            names: list[dict[str, object]] = [{"rfilename": name} for name in repository.files]
            if self.query.get("blobs"):
                names = [
                    {"rfilename": name, "blobId": "0" * 40, "size": path.stat().st_size}
                    for name, path in repository.files.items()
                ]
            gated = "manual" if repository.gated else False
            about = {"_id": "6", "id": repository.id, "sha": repository.commit, "private": repository.private, "gated": gated}
            return _json({**about, "disabled": False, "downloads": 1, "likes": 0, "tags": [], "siblings": names})
        if rest[0] == "refs":
            commit = {"targetCommit": repository.commit}
            branches = [{"name": name, "ref": f"refs/heads/{name}", **commit} for name in repository.branches]
            return _json({"branches": branches, "tags": [], "converts": []})
        self._check_revision(repository, rest[1])
        if rest[0] == "paths-info":
            wanted = [path.strip("/") for path in self.form.get("paths", [])]
            found = [entry for entry in repository.tree("", recursive=True) or [] if entry["path"] in wanted]
            folders = {"/".join(name.split("/")[:depth]) for name in repository.files for depth in range(1, name.count("/") + 1)}
            found += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in wanted if name in folders]
            return _json({entry["path"]: entry for entry in found}.values())
        if rest[0] == "tree":
            entries = repository.tree("/".join(rest[2:]), self.query.get("recursive", "").lower() in ("true", "1"))
            if entries is None:
                raise RefusalError(404, f"{'/'.join(rest[2:])} does not exist on {rest[1]!r}", "EntryNotFound")
            begin = int(self.query.get("cursor", 0))
            path = urlsplit(self.path)
            query = "&".join(f"{name}={quote(value)}" for name, value in self.query.items() if name != "cursor")
            following = f'<{self.hub.endpoint}{path.path}?{query}&cursor={begin + PAGE}>; rel="next"'
            return _json(entries[begin : begin + PAGE], {"Link": following} if begin + PAGE < len(entries) else {})
        raise RefusalError(404, "Sorry, we can't find the page you are looking for.")

    def _resolve(self, repository: Repository, revision: str, name: str, token: str) -> tuple[int, dict[str, str], bytes]:
        self._check_revision(repository, revision)
        if repository.gated and token != MEMBER and name != "README.md":
            what = f"Access to {repository.kind[:-1]} {repository.id} is restricted"
            if not token:
                what += ". You must have access to it and be authenticated to access it. Please log in."
                raise RefusalError(401, what, "GatedRepo")
            what += f" and you are not in the authorized list. Visit https://huggingface.co/{repository.id} to ask for access."
            raise RefusalError(403, what, "GatedRepo")
        if name not in repository.files:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": repository.commit, **_etag(repository, name)}
        if name.endswith(LARGE):
            at = f"http://localhost:{self.hub.port}/cdn/{repository.kind}/{repository.id}/{quote(name)}"
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(repository.files[name].stat().st_size)}
            return 302, {**headers, "ETag": '"of-the-answer"', "Location": at}, b""
        at = f"/api/resolve-cache/{repository.kind}/{repository.id}/{repository.commit}/{quote(name)}"
        return 307, {**headers, "Location": at}, b""

    def _check_revision(self, repository: Repository, revision: str) -> None:
        if revision not in (*repository.branches, repository.commit):
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _content(self, file: Path, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        content = file.read_bytes()
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        span = (self.headers.get("Range") or "").removeprefix("bytes=")
        if not span:
            return 200, headers, content
        first, _, last = span.partition("-")
        begin, end = (int(first), int(last or len(content) - 1)) if first else (len(content) - int(last), len(content) - 1)
        end = min(end, len(content) - 1)
        return 206, {**headers, "Content-Range": f"bytes {begin}-{end}/{len(content)}"}, content[begin : end + 1]


def _etag(repository: Repository, name: str) -> dict[str, str]:
    entry = repository.entry(name)
    lfs = entry.get("lfs")
    return {"ETag": f'"{lfs["oid"] if isinstance(lfs, dict) else entry["oid"]}"', "X-Repo-Commit": repository.commit}


def _json(value: object, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    listed = list(value) if isinstance(value, (Iterator, type({}.values()))) else value
    return 200, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, json.dumps(listed).encode()
