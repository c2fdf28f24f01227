"""Push exported folders to the Hugging Face hub.

The token comes from HF_TOKEN or `hf auth login`, and is in no option, config or log. Whether a push is possible is checked first,
since making the folder may take a training run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hybrid_lightning.errors import ConfigError, one_line

_LOG_IN = "give a token with write access by HF_TOKEN or 'hf auth login' (https://huggingface.co/settings/tokens)"
_OURS = "plan.json"  # each exported folder has it


def open_repository(name: str) -> str:
    """Make sure that a folder can be pushed to a repository. If the repository does not exist, it is created, as a private one.

    Args:
        name: `OWNER/NAME`, or `NAME` for the owner of the token.

    Returns:
        The name with the owner.

    Raises:
        ConfigError: If the token is missing or has no write access, if the hub does not answer, or if a push would replace files
            that are not an export of this package.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"push_to={name!r}: HF_HUB_OFFLINE is set; unset it, or leave push_to out")
    if get_token() is None:
        raise ConfigError(f"push_to={name!r} needs a hub token; {_LOG_IN}")
    with _explained(name):
        api = HfApi()
        repository = api.create_repo(name, private=True, exist_ok=True).repo_id
        # `create_repo` also succeeds if the repository exists and belongs to somebody else.
        address = f"{api.endpoint}/api/models/{repository}/auth-check/write"
        hf_raise_for_status(get_session().get(address, headers=build_hf_headers()))
        files = set(api.list_repo_files(repository)) - {".gitattributes"}
    if files and _OURS not in files:
        raise ConfigError(
            f"push_to={name!r}: {repository} has {len(files)} files, such as {min(files)}, but no {_OURS}: it is not an export, "
            "and a push would replace its files; give another name"
        )
    return repository


def push_folder(folder: Path, repository: str, message: str) -> str:
    """Push an exported folder in one commit, which replaces all other files of the repository; returns its address.

    Raises:
        ConfigError: If the push fails; the message has the command to push the folder later.
    """
    with _explained(repository, f"; the export is in {folder}, and 'hf upload {repository} {folder}' pushes it"):
        api = HfApi()
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, delete_patterns="*")
        return f"{api.endpoint}/{repository}"


@contextmanager
def _explained(name: str, remains: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # versions of huggingface_hub use different libraries for HTTP
        cause = f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            cause = f"the hub token has no write access there; {_LOG_IN}, or give another name"
        raise ConfigError(f"push_to={name!r}: {cause}{remains}") from error
