"""The reward of both sides: a number between 0 and 1 that depends on the text alone and on its place in the batch."""

import zlib
from collections.abc import Sequence


def hashed_reward(completions: Sequence[str]) -> list[float]:
    """Spread as if drawn at random: no group ties, even if its completions are equal, so that no row can be skipped."""
    return [zlib.crc32(f"{place} {text}".encode()) / 2**32 for place, text in enumerate(completions)]
