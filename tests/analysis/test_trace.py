"""The trace of choices: as the counters say, on any mesh."""

import jax
import numpy as np
import pytest

from moe_jax.analysis import trace
from moe_jax.data import pipeline
from tests.support.toy_text import read, toy_model, toy_rows
from tests.support.toys import mesh_of, toy_config

MESHES = [{}, pytest.param(dict(expert=4, data=2), marks=pytest.mark.slow)]


@pytest.mark.parametrize("axes", MESHES)
def test_trace_agrees_with_the_counters(axes, weights):
  """The counters of one device, on any mesh."""
  rows = toy_rows([30, 3, 17, 25, 9, 8], [0, 1, 0, 1, 1, 0])
  model = toy_model(toy_config(eval_capacity_factor=1.0), weights)
  batches = list(pipeline.eval_batches(rows, 16, 0))
  assert len(batches) == 1 and not batches[0].segments_BL[-1].any()  # the last rows are padding
  with jax.set_mesh(mesh_of()):
    stats = read(model, batches[0])[1]
  mesh = mesh_of(**axes)
  with jax.set_mesh(mesh):
    choices = trace.compile_choices(model.config)
    found = trace.collect(choices, model, rows, list(range(len(rows))), 8, mesh)  # two batches
  assert found.token_T.tolist() == rows.stream_N[:-1].tolist()
  assert found.place_T.tolist() == [i % 9 for i in range(len(rows.stream_N) - 1)]
  assert found.row_T.tolist() == [i // 9 for i in range(len(rows.stream_N) - 1)]
  labels = np.repeat([0, 1, 0, 1, 1, 0], [31, 4, 18, 26, 10, 9])
  assert found.domain_T.tolist() == labels.tolist()
  np.testing.assert_array_equal(found.routed_ZTE.sum(axis=1), stats.routed_E)
  np.testing.assert_array_equal(found.kept_ZTE.sum(axis=1), stats.kept_E)
  np.testing.assert_allclose(found.gate_ZTE.sum(axis=1), stats.importance_E, rtol=1e-5)
  assert not found.kept_ZTE[~found.routed_ZTE].any()
  assert found.kept_ZTE.sum() < found.routed_ZTE.sum()


def test_rows_are_spread_over_the_split():
  assert trace.spread(9, 3) == [0, 4, 8]
  assert trace.spread(3, 9) == [0, 1, 2]
  assert trace.spread(1, 4) == [0]
