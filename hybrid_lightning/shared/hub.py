"""The Hugging Face hub: whether it can be reached, and its errors in words for users.

Other libraries load models and data sets from the hub. They wrap its errors in their own messages and, without a network, wait
half a minute for each file. So this file checks once whether the hub answers; if not, only the cache is used.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from lightning.pytorch.utilities import rank_zero_warn

from hybrid_lightning.errors import one_line


def hub_reachable() -> bool:
    """Whether the hub answers. This is checked once, with a warning if it does not. False under HF_HUB_OFFLINE."""
    return not constants.HF_HUB_OFFLINE and hub_answers()


@functools.cache
def hub_answers() -> bool:
    """Check once in this process whether the hub answers at all."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # huggingface_hub's versions use different libraries for HTTP
        rank_zero_warn(f"the hub {constants.ENDPOINT} cannot be reached ({one_line(error)}); using only the cache")
        return False
    return True


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Context in which other libraries use the cache immediately if the hub cannot be reached, instead of waiting for each file.

    No argument of these libraries covers all their requests, but all read the value that HF_HUB_OFFLINE had at import.
    """
    switches: list[Any] = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    offline = not hub_reachable()
    for switch in switches:
        switch.HF_HUB_OFFLINE = switch.HF_HUB_OFFLINE or offline
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


@dataclass(frozen=True)
class HubRepository:
    """A model or data set on the hub. The methods return error messages with the cause and the remedy."""

    kind: str  # "model" or "data set"
    id: str  # name on the hub, as the user gave it
    revision: str | None
    revision_option: str  # name of the option for the revision
    cache: str  # folder of the cache

    def explain(self, error: BaseException) -> str | None:
        """Explain an error that occurred while reading it; None if the error is unrelated to the hub."""
        for cause in _chain(error):
            if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
                continue  # libraries also request files that need not exist
            if isinstance(cause, HfHubHTTPError):
                return self._refused(cause)
            if isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
                return self.not_in_cache()
        return self.not_in_cache() if isinstance(error, OSError) and not hub_reachable() else None

    def _refused(self, error: HfHubHTTPError) -> str:
        status = error.response.status_code
        if isinstance(error, GatedRepoError):
            return self.gated()
        if isinstance(error, RevisionNotFoundError):
            return self.no_revision()
        if "Invalid credentials" in str(error) or "is expired" in str(error):
            return (
                "the hub rejects the token of HF_TOKEN or 'hf auth login', which is revoked, expired or mistyped; get a new one "
                "from https://huggingface.co/settings/tokens, or unset it ('hf auth logout'): public repositories need no token"
            )
        if isinstance(error, RepositoryNotFoundError) or status == 401:
            return self.not_found()
        return f"the hub answered {status} for the {self.kind} {self.id!r}: {one_line(error, 200)}; try again later"

    @property
    def _page(self) -> str:
        return f"https://huggingface.co/{'' if self.kind == 'model' else 'datasets/'}{self.id}"

    def not_found(self) -> str:
        """Message: it does not exist, or this user may not see it."""
        owner = "" if "/" in self.id else " (most are OWNER/NAME)"
        return (
            f"{self.id!r} is neither a folder here nor a public {self.kind} on the hub; correct it{owner}, or log in with "
            "'hf auth login' or HF_TOKEN if it is private"
        )

    def gated(self) -> str:
        """Message: the logged-in user must accept its terms first."""
        return (
            f"the {self.kind} {self.id!r} is gated, and you have no access; accept its terms at {self._page} and log in with "
            "'hf auth login' or HF_TOKEN (a fine-grained token must be allowed to read gated repositories)"
        )

    def no_revision(self) -> str:
        """Message: it does not have this revision."""
        return (
            f"the {self.kind} {self.id!r} has no revision {self.revision!r}; give {self.revision_option} a branch, tag or commit "
            f"of {self._page}/commits/main, or leave it out for the newest"
        )

    def not_in_cache(self) -> str:
        """Message: it must be read from the cache, but is not there."""
        revision = "" if self.revision is None else f" at revision {self.revision!r}"
        missing = f"the {self.kind} {self.id!r}{revision} is missing or incomplete in the cache {self.cache}"
        if constants.HF_HUB_OFFLINE:
            return f"{missing}, and HF_HUB_OFFLINE is set; unset it to download, or copy the cache from a machine that has it"
        return (
            f"{missing}, and the hub {constants.ENDPOINT} cannot be reached; check the network, HTTPS_PROXY for a proxy and "
            "HF_ENDPOINT for a mirror, or give a local folder"
        )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
