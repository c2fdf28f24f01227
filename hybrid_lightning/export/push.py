"""Push exported folders to the Hugging Face hub.

The token comes from HF_TOKEN or `hf auth login`: no option, config or log has it. Whether a folder can be pushed is checked
before it is made, which may take a training run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hybrid_lightning.errors import ConfigError, one_line

_LOG_IN = "give one that may write by HF_TOKEN or 'hf auth login' (https://huggingface.co/settings/tokens)"
_OURS = "plan.json"  # each exported folder has it


def open_repository(name: str) -> str:
    """Make sure that a folder can be pushed to a repository, which is made, and private, if it is not there.

    Args:
        name: `OWNER/NAME`, or `NAME` for the owner of the token.

    Returns:
        Its name with the owner.

    Raises:
        ConfigError: If the token is missing or may not write there, the hub does not answer, or the repository has files that a
            push would replace and that are not an export of this package.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"push_to={name!r}: HF_HUB_OFFLINE is set; unset it, or leave push_to out")
    if get_token() is None:
        raise ConfigError(f"push_to={name!r} needs a token of the hub; {_LOG_IN}")
    with _explained(name):
        api = HfApi()
        repository = api.create_repo(name, private=True, exist_ok=True).repo_id
        # `create_repo` also succeeds if the repository exists and belongs to somebody else.
        address = f"{api.endpoint}/api/models/{repository}/auth-check/write"
        hf_raise_for_status(get_session().get(address, headers=build_hf_headers()))
        files = set(api.list_repo_files(repository)) - {".gitattributes"}
    if files and _OURS not in files:
        raise ConfigError(
            f"push_to={name!r}: {repository} has {len(files)} files, such as {min(files)}, but not {_OURS}: it is not an export, "
            "and a push would replace them; give another name"
        )
    return repository


def push_folder(folder: Path, repository: str, message: str) -> str:
    """Push an exported folder in one commit, after which the repository holds nothing else, and return its address.

    Raises:
        ConfigError: If that fails; the message has the command that pushes the folder later.
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
            cause = f"the hub's token may not write there; {_LOG_IN}, or another name"
        raise ConfigError(f"push_to={name!r}: {cause}{remains}") from error
