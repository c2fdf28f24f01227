"""The embedded default: tiny policies that are shipped in the package."""

from pathlib import Path

# Model string -> folder beside this file: for products in one turn, for episodes, and the first one's teacher.
EMBEDDED = {"embedded": "tiny_policy", "embedded:episodes": "episodes_policy", "embedded:teacher": "teacher_policy"}


def embedded_policy_path(model: str = "embedded") -> Path:
    """Folder of an embedded policy in Hugging Face format.

    Args:
        model: A key of `EMBEDDED`.
    """
    return Path(__file__).parent / EMBEDDED[model]
