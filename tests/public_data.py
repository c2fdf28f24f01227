"""Files of public data sets, in the folder that the variable HYBRID_LIGHTNING_TEST_DATA of the environment names."""

import os
from pathlib import Path

import pytest


def public_data(name: str) -> str:
    """Path of a file or folder of it; without, the test is skipped."""
    path = Path(os.environ.get("HYBRID_LIGHTNING_TEST_DATA", ""), name)
    if "HYBRID_LIGHTNING_TEST_DATA" not in os.environ or not path.exists():
        pytest.skip(f"HYBRID_LIGHTNING_TEST_DATA names no folder with {name}")
    return str(path)
