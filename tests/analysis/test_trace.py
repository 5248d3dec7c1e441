"""The trace of choices: as the counters say, on any mesh."""

import jax
import numpy as np
import pytest

from moe_jax.analysis import trace
from moe_jax.data import pipeline
from tests.support.toy_text import read, toy_model, toy_rows
from tests.support.toys import mesh_of, toy_config

MESHES = [{}, pytest.param(dict(expert=4, data=2), marks=pytest.mark.slow)]


LENGTHS, LABELS = [30, 3, 17, 25, 9, 8], [0, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_the_trace_holds_what_became_of_every_token(axes):
  """Two batches on a mesh, the last rows of the second are padding; and one on one device."""
  rows = toy_rows(LENGTHS, LABELS)
  model = toy_model(toy_config(eval_capacity_factor=1.0))
  batches = [rows.batch(numbers) for numbers in pipeline.eval_batches(range(len(rows)), 16)]
  assert len(batches) == 1 and not batches[0].segments_BL[-1].any()
  with jax.set_mesh(mesh_of()):
    stats = read(model, batches[0])[1]
  mesh = mesh_of(**axes)
  with jax.set_mesh(mesh):
    found = trace.collect(model, rows, list(range(len(rows))), 8, mesh)
  places = range(len(rows.stream_N) - 1)
  assert found.token_T.tolist() == rows.stream_N[:-1].tolist()
  assert found.place_T.tolist() == [i % 9 for i in places]
  assert found.row_T.tolist() == [i // 9 for i in places]
  labels = np.repeat(LABELS, [length + 1 for length in LENGTHS])
  assert found.domain_T.tolist() == labels.tolist()
  np.testing.assert_array_equal(found.routed_ZTE.sum(axis=1), stats.routed_E)
  np.testing.assert_array_equal(found.kept_ZTE.sum(axis=1), stats.kept_E)
  np.testing.assert_allclose(found.gate_ZTE.sum(axis=1), stats.importance_E, rtol=1e-5)
  # Some choices are dropped, and only choices are kept.
  assert not found.kept_ZTE[~found.routed_ZTE].any()
  assert found.kept_ZTE.sum() < found.routed_ZTE.sum()
