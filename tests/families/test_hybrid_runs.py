"""The columns that are tried with one run of each family, with a hybrid plan."""

import pytest
from table import assert_column


@pytest.mark.long
@pytest.mark.parametrize("column", ["hybrid by score", "passes", "agreement", "export"])
def test_what_is_tried_is_what_the_page_says(column):
    assert_column(column)
