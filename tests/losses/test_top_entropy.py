import math

import pytest
import torch

from hybrid_lightning.errors import ConfigError
from hybrid_lightning.losses import TopEntropyMask


@pytest.mark.parametrize(("share", "count"), [(0.05, 101), (0.2, 7), (0.2, 1), (0.3, 10), (0.5, 2), (1.0, 7)])
def test_it_keeps_the_share_and_what_trls_quantile_keeps(share, count):
    entropies = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    kept = entropies >= TopEntropyMask(share).threshold(entropies)
    assert kept.sum() == math.floor(share * (count - 1) + 1e-9) + 1
    assert kept.equal(entropies >= torch.quantile(entropies, 1 - share) - 1e-12)


def test_equal_entropies_at_the_threshold_are_kept_and_nothing_keeps_nothing():
    assert TopEntropyMask(0.25).threshold(torch.tensor([0.5, 0.5, 0.5, 0.1])) == 0.5
    assert TopEntropyMask(0.25).threshold(torch.zeros(0)) == math.inf


def test_bad_share():
    for share in (0.0, 1.01, math.nan):
        with pytest.raises(ConfigError, match=rf"TopEntropyMask: share={share} must be above 0 and at most 1"):
            TopEntropyMask(share)
