"""`ReplyCache`: replies of servers, kept on disk, so that a run that is resumed or repeated gets the same ones."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4


class ReplyCache:
    """Texts in a folder, a file each, by a hash of all that they depend on. Threads and processes may share it.

    Args:
        folder: The folder; None takes `name` in `~/.cache/hybrid_lightning`.
        name: What the replies are, such as `judge`.
    """

    def __init__(self, folder: str | None, name: str) -> None:
        self.folder = Path(folder or f"~/.cache/hybrid_lightning/{name}").expanduser().absolute()

    def path(self, *depends_on: Any) -> Path:
        """The file of a reply, by the values, as JSON, that it depends on."""
        name = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def known(self, path: Path) -> str | None:
        """A reply that is there already."""
        return str(json.loads(path.read_text(encoding="utf-8"))["reply"]) if path.exists() else None

    def keep(self, path: Path, reply: str) -> str:
        """Keep a reply, and return the one that is kept: another process may have been first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{uuid4().hex}")
        whole.write_text(json.dumps({"reply": reply}), encoding="utf-8")
        try:
            os.link(whole, path)
        except FileExistsError:
            return self.known(path) or reply
        finally:
            whole.unlink()
        return reply
