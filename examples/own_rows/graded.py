"""A reward that pays for a part of the answer."""


def right_positions(completion, answer):
    """The share of right characters, each in its place; a working in brackets before the number does not count."""
    number = completion.rpartition("]")[2]
    return sum(map(str.__eq__, number, answer)) / max(len(number), len(answer))
