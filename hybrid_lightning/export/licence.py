"""The licence of a base model, which what was trained from it has to keep."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from hybrid_lightning.export.trained import BaseModel
from hybrid_lightning.hub import not_waiting


def base_licence(base: BaseModel) -> str | None:
    """Look the licence up where the base model is.

    Returns:
        Its identifier, such as `apache-2.0`; None if nothing there says so, or the hub cannot be reached.
    """
    if base.model == "embedded":
        return "apache-2.0"  # part of this package
    source = base.source
    folder = Path(source.location)
    if "gguf_file" in source.arguments:
        return _of_gguf(folder / source.arguments["gguf_file"])
    if folder.is_dir():
        return _of_card(folder / "README.md")
    try:
        with not_waiting():
            card = hf_hub_download(source.location, "README.md", revision=base.revision)
    except (OSError, ValueError, HfHubHTTPError):  # no network, no card, no access
        return None
    return _of_card(Path(card))


def copy_licence_files(base: BaseModel, folder: Path) -> None:
    """Copy what a local base has in LICENSE and NOTICE files, which most licences ask to pass on."""
    source = Path(base.source.location)
    if source.is_dir():
        for file in source.iterdir():
            if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
                shutil.copyfile(file, folder / file.name)


def _of_card(card: Path) -> str | None:
    """The field of a model card's header."""
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        header: Any = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    licence = header.get("license") if isinstance(header, dict) else None
    return licence if isinstance(licence, str) else None


def _of_gguf(file: Path) -> str | None:
    from gguf import GGUFReader  # an extra; without it the model could not have been loaded

    field = GGUFReader(file).get_field("general.license")
    return None if field is None else str(field.contents())
