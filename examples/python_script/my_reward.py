"""The reward of `train.py`."""


def right(completions, answer):
    """1 for the right number, whether or not a working in brackets comes before it."""
    return [float(text.rpartition("]")[2] == gold) for text, gold in zip(completions, answer, strict=True)]
