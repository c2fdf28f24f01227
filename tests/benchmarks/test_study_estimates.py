import math

import pytest

pytest.importorskip("scipy", reason="the study's intervals need scipy: pip install 'hybrid-lightning[study]'")

from benchmarks.study.estimates import gap_closed, holm, mean, p_value, ratio


def test_the_interval_of_a_mean_and_the_p_value_are_students():
    estimate = mean([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t at 97.5% with 3 degrees of freedom
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-6)
    assert math.isnan(mean([1.0]).low)
    assert p_value([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.0132, abs=1e-4)  # t = 3 / sqrt(2.5 / 5) = 4.243, 4 degrees
    assert p_value([1.0]) == p_value([0.0, 0.0]) == 1.0 and p_value([2.0, 2.0]) == 0.0


def test_the_interval_of_a_ratio_holds_what_the_t_test_allows_and_no_more():
    parts, wholes = [3.0, 5.0, 4.0, 6.0, 2.0], [8.0, 7.0, 9.0, 8.5, 6.0]
    estimate = ratio(parts, wholes)
    assert estimate.value == pytest.approx(4 / 7.7)
    for end, inside in ((estimate.low, 1e-6), (estimate.high, -1e-6)):
        nearer, farther = (mean([p - q * w for p, w in zip(parts, wholes, strict=True)]) for q in (end + inside, end - inside))
        assert nearer.low < 0 < nearer.high and not farther.low < 0 < farther.high
    assert ratio(parts, [-9.0, 9.0, 1.0, -8.0, 8.0]).text() == "2000.0 [-inf, inf]"
    low, half_way, high = ({s: start + 0.01 * s for s in range(8)} for start in (0.2, 0.4, 0.6))
    assert gap_closed(half_way, low, high).text() == "50.0 [50.0, 50.0]" and gap_closed(low, low, low).text() == "-"
    noisy = gap_closed({**half_way, 0: 0.9, 8: 9.0}, low, high)
    assert noisy.low < noisy.value < noisy.high and noisy.number == 8, "on the seeds that all have"


def test_holm_rejects_in_order_and_stops_at_the_first_that_is_not_small_enough():
    """Of four at 5%: the smallest at most 0.0125, the next 0.0167, 0.025, 0.05 (Holm, 1979)."""
    assert holm([0.04, 0.012, 0.016, 0.03]) == [False, True, True, False]
    assert holm([0.013, 0.001, 0.9, 0.0166]) == [True, True, False, True] and holm([]) == []
