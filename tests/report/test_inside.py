"""Heat maps of the load."""

import numpy as np

from moe_jax.report import inside, runs


def test_heat_map_bins():
  lines = [{"step": s, "load_ZE": [[s / 10, 1 - s / 10]]} for s in (1, 2, 3, 4)]
  run = runs.Run(name="a", seed=0, status="finished", train=lines)
  found = inside.heat(run, 2)
  assert found["steps"] == [2, 4]
  # Loads 0.15 and 0.35 of two experts, whose fair share is a half.
  np.testing.assert_allclose(found["load_ZES"], [[[0.3, 0.7], [1.7, 1.3]]])
