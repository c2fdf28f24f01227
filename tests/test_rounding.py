"""The bound for sums in another order holds for all orders, and is far below the effect of a mistake."""

import pytest
import torch
from rounding import assert_same_sums


@pytest.mark.parametrize(("additions", "dtype"), [(32, torch.float32), (700, torch.float64), (2000, torch.float32)])
def test_orders_of_adding_differ_by_a_fraction_of_the_bound_and_mistakes_by_more(additions, dtype):
    terms = torch.randn(200, additions, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    order = torch.randperm(additions, generator=torch.Generator().manual_seed(1))

    def one_by_one(terms):
        total = torch.zeros(len(terms), dtype=dtype)
        for column in terms.T:
            total += column
        return total

    forwards, shuffled = one_by_one(terms), one_by_one(terms[:, order])
    assert not torch.equal(forwards, shuffled)
    assert_same_sums(forwards, shuffled, additions)
    assert_same_sums(list(forwards.split(50)), list(shuffled.split(50)), additions)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_sums(one_by_one(terms[:, 1:]), shuffled, additions)
    with pytest.raises(AssertionError, match=r"slope: .*not close"):
        assert_same_sums({"slope": forwards * 1.001}, {"slope": shuffled}, additions)
