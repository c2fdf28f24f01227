"""`ReplyCache`: keeps replies of servers on disk, so that a resumed or repeated run gets the same replies."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4


class ReplyCache:
    """Texts in a folder, one file each, keyed by a hash of their inputs. Threads and processes may share it.

    Args:
        folder: The folder; None for `name` in `~/.cache/hybrid_lightning`.
        name: Kind of replies, such as `judge`.
    """

    def __init__(self, folder: str | None, name: str) -> None:
        self.folder = Path(folder or f"~/.cache/hybrid_lightning/{name}").expanduser().absolute()

    def path(self, *depends_on: Any) -> Path:
        """The file of a reply; its name is a hash of these values as JSON."""
        name = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def known(self, path: Path) -> str | None:
        """The cached reply, or None."""
        return str(json.loads(path.read_text(encoding="utf-8"))["reply"]) if path.exists() else None

    def keep(self, path: Path, reply: str) -> str:
        """Keep a reply; returns the kept one, since another process may have been first."""
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
