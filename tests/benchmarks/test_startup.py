"""What a user waits for stays within twice its budget, which a slow machine needs."""

import pytest

from benchmarks import startup


@pytest.mark.slow
def test_nothing_takes_twice_its_budget(tmp_path):
  measured = startup.measure(tmp_path, rounds=1)
  assert measured.keys() == startup.BUDGETS.keys()
  assert not {what: value for what, value in measured.items() if value > 2 * startup.BUDGETS[what]}
