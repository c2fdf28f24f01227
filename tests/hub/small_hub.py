"""A small Hugging Face hub within this process: huggingface_hub's own client gets its answers, and nothing else is replaced.

As the real one it answers 401 for what does not exist to who is not logged in, 404 to who is, 403 with `GatedRepo` for a gated
repository, and 401 for a token that was revoked, whatever is asked for.
"""

import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import datasets
import hub_contents
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from hybrid_lightning.shared.hub import hub_answers

httpx: Any = sys.modules[type(_http.default_client_factory()).__module__.partition(".")[0]]  # in newer versions httpx2
MEMBER, STRANGER, REVOKED = "hf_member", "hf_stranger", "hf_revoked"  # tokens: admitted to gated repositories, not, known no more
_QUESTIONS = ("revision", "paths-info", "tree", "resolve")  # about a repository


@dataclass
class Repository:
    """A folder under an id."""

    id: str
    kind: str  # "models" or "datasets"
    folder: Path
    gated: bool = False
    private: bool = False

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1(f"{self.kind}/{self.id}".encode()).hexdigest()

    @cached_property
    def files(self) -> dict[str, Path]:
        return {str(path.relative_to(self.folder)): path for path in sorted(self.folder.rglob("*")) if path.is_file()}

    def etag(self, name: str) -> str:
        return hashlib.sha1(self.files[name].read_bytes()).hexdigest()

    def entries(self) -> list[dict[str, Any]]:
        """All files and folders as a tree lists them."""
        folders = {str(above) for name in self.files for above in Path(name).parents} - {"."}
        listed = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(folders)]
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return [*listed, *({"type": "file", "oid": self.etag(name), "size": sizes[name], "path": name} for name in sizes)]


class RefusalError(Exception):
    """An answer that is an error: its status, its message and, where it has one, its code."""


@dataclass
class Hub:
    """All repositories; `requests` is what was asked, as "METHOD /path"."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    reachable: bool = True
    written: Path = Path()  # where repositories lie that are made

    def add(self, id: str, kind: str, folder: Path, **more: bool) -> None:
        self.repositories[kind, id] = Repository(id, kind, folder, **more)

    @contextmanager
    def connected(self, home: Path) -> Iterator[None]:
        """Within this context all libraries ask this hub and have their caches in a folder, as of a user who never logged in."""
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("HF_TOKEN", raising=False)
            patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
            patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "datasets"))
            patch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", self._client)
            huggingface_hub.close_session()
            hub_answers.cache_clear()
            yield
        huggingface_hub.close_session()
        hub_answers.cache_clear()

    def _client(self) -> Any:
        client = _http.default_client_factory()
        client._transport, client._mounts = httpx.MockTransport(self.answer), {}
        return client

    def weights_asked(self, since: int = 0) -> list[str]:
        """Requests for weights, from the so-manieth request on."""
        return [request for request in self.requests[since:] if ".safetensors" in request and "index.json" not in request]

    def answer(self, request: Any) -> Any:
        """Answer a request, or have no network."""
        if not self.reachable:
            raise httpx.ConnectError("no network", request=request)
        path = request.url.raw_path.decode().partition("?")[0]
        self.requests.append(f"{request.method} {path}")
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            if token and token not in (MEMBER, STRANGER):
                raise RefusalError(401, "Invalid credentials in Authorization header")
            return self._found([unquote(part) for part in path.strip("/").split("/")], token, request)
        except RefusalError as refusal:
            status, message, *code = refusal.args
            headers = {"X-Error-Message": message, **({"X-Error-Code": code[0]} if code else {})}
            return httpx.Response(status, headers=headers, json={"error": message})

    def _found(self, parts: list[str], token: str, request: Any) -> Any:
        if parts == [""]:
            return httpx.Response(200)
        if request.method == "POST" and (found := self._written(parts[1:], token, request)) is not None:
            return found
        parts = parts[parts[0] == "api" :]
        kind = "datasets" if parts[0] == "datasets" else "models"
        if parts[-2:] == ["auth-check", "write"]:
            self._check_writes(self._repository(kind, "/".join(parts[1:-2]), token).id, token)
            return httpx.Response(200)
        rest = parts[parts[0] == kind :]
        at = next((place for place, part in enumerate(rest) if place and part in _QUESTIONS), len(rest))
        repository = self._repository(kind, "/".join(rest[:at]), token)
        question, revision, *names = rest[at:] or ["revision", "main"]
        if revision not in ("main", repository.commit):
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return getattr(self, f"_{question.replace('-', '_')}")(repository, "/".join(names), token, request)

    def _check_writes(self, id: str, token: str) -> None:
        if token != MEMBER or id.partition("/")[0] != "me":
            raise RefusalError(403, "You don't have the rights to write here")

    def _written(self, parts: list[str], token: str, request: Any) -> Any:
        """Answer what makes a repository or a commit; None to other requests."""
        if parts == ["repos", "create"]:
            wanted = json.loads(request.content)
            id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if ("models", id) not in self.repositories:
                self._check_writes(id, token)
                (folder := self.written / id).mkdir(parents=True)
                (folder / ".gitattributes").write_text("")
                self.add(id, "models", folder, private=wanted.get("private") or wanted.get("visibility") == "private")
                return httpx.Response(200, json={"url": f"{constants.ENDPOINT}/{id}"})
            return httpx.Response(409, json={"error": "You already created this repo", "url": f"{constants.ENDPOINT}/{id}"})
        if parts == ["validate-yaml"]:
            return httpx.Response(200, json={"errors": [], "warnings": []})
        if "preupload" in parts:
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **regular} for file in json.loads(request.content)["files"]]
            return httpx.Response(200, json={"files": files})
        if "commit" not in parts:
            return None
        id = "/".join(parts[1:3])
        self._check_writes(id, token)
        folder = self.repositories["models", id].folder
        for line in map(json.loads, request.content.splitlines()):
            place = folder / line["value"].get("path", "")
            if line["key"] == "deletedFile":
                place.unlink()
            if line["key"] == "file":
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(base64.b64decode(line["value"]["content"]))
        self.add(id, "models", folder, private=True)
        return httpx.Response(
            200, json={"success": True, "commitOid": "1" * 40, "commitUrl": f"{constants.ENDPOINT}/{id}/commit/1"}
        )

    def _repository(self, kind: str, id: str, token: str) -> Repository:
        repository = self.repositories.get((kind, id))
        if repository is None:
            if not token:
                raise RefusalError(401, "Invalid username or password.")  # without a code
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return repository

    def _revision(self, repository: Repository, name: str, token: str, request: Any) -> Any:
        about = {"_id": "6", "id": repository.id, "sha": repository.commit, "private": False, "tags": []}
        files = [{"rfilename": name, "size": path.stat().st_size} for name, path in repository.files.items()]
        return httpx.Response(200, json={**about, "gated": repository.gated and "manual", "siblings": files})

    def _tree(self, repository: Repository, name: str, token: str, request: Any) -> Any:
        above, recursive = Path(name), request.url.params.get("recursive", "").lower() in ("true", "1")
        entries = [entry for entry in repository.entries() if above in Path(entry["path"]).parents]
        if name and not entries:
            raise RefusalError(404, f"{name} does not exist", "EntryNotFound")
        return httpx.Response(200, json=[entry for entry in entries if recursive or Path(entry["path"]).parent == above])

    def _paths_info(self, repository: Repository, name: str, token: str, request: Any) -> Any:
        wanted = [path.strip("/") for path in parse_qs(request.content.decode()).get("paths", [])]
        return httpx.Response(200, json=[entry for entry in repository.entries() if entry["path"] in wanted])

    def _resolve(self, repository: Repository, name: str, token: str, request: Any) -> Any:
        if repository.gated and token != MEMBER and name != "README.md":
            what = f"Access to {repository.kind[:-1]} {repository.id} is restricted and you are not in the authorized list."
            raise RefusalError(403, what, "GatedRepo")
        if name not in repository.files:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{repository.etag(name)}"'}
        return httpx.Response(200, headers=headers, content=repository.files[name].read_bytes())


def filled_hub(folder: Path) -> Hub:
    """A hub with models of two families, the data sets of our presets, and what a user may run into."""
    hub, models, data = Hub(written=folder / "written"), folder / "models", hub_contents.write_data_sets(folder / "datasets")
    qwen3, gemma2 = (hub_contents.write_model(models / family, family) for family in ("qwen3", "gemma2"))
    for id in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"):
        hub.add(id, "models", qwen3)
    hub.add("google/gemma-2-2b-it", "models", gemma2, gated=True)
    for id, repository in data.items():
        hub.add(id, "datasets", repository)
    cut = shutil.copytree(qwen3, models / "cut")
    sorted(cut.glob("*.safetensors"))[1].unlink()
    for name, place in (("base", qwen3), ("strict", gemma2), ("cut", cut)):
        hub.add(f"me/{name}", "models", place)
    hub.add("me/gated", "models", qwen3, gated=True)
    hub.add("me/gated", "datasets", data["math-ai/amc23"], gated=True)
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    packed = json.dumps(json.loads((qwen3 / "config.json").read_text()) | quantized)
    tokenizer = {path.name: path.read_text() for path in qwen3.iterdir() if "token" in path.name or "chat" in path.name}
    for kind, name, files in (
        ("models", "packed", {"config.json": packed, "model.safetensors": "", **tokenizer}),
        ("models", "gguf", {"README.md": "---\nlicense: mit\n---\n", "tiny.Q8_0.gguf": "GGUF"}),
        ("datasets", "program", {"program.py": "import datasets\n"}),
        ("datasets", "empty", {"README.md": "# Nothing yet\n"}),
    ):
        place = folder / "me" / name
        place.mkdir(parents=True)
        for file, text in files.items():
            (place / file).write_text(text)
        hub.add(f"me/{name}", kind, place)
    return hub
