"""The embedded default: a tiny policy that is shipped in the package."""

from pathlib import Path


def embedded_policy_path() -> Path:
    """Folder of the embedded policy in Hugging Face format."""
    return Path(__file__).parent / "tiny_policy"
