"""A tool: any function with type hints and a docstring."""


def price(order: str) -> str:
    """Return the price of an order.

    Args:
        order: Price of one and how many, with * between them, such as 347*68.
    """
    one, count = order.split("*")
    return str(int(one) * int(count))
