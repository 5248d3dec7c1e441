"""The trace of choices: as the counters say, on any mesh."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from moe_jax.analysis import specialisation, trace
from moe_jax.data import pipeline
from moe_jax.moe import counts
from tests.support.toy_text import read, toy_model, toy_rows
from tests.support.toys import mesh_of, toy_config

MESHES = [{}, pytest.param(dict(expert=4, data=2), marks=pytest.mark.slow)]


LENGTHS, LABELS = [30, 3, 17, 25, 9, 8], [0, 1, 0, 1, 1, 0]


class Traced(NamedTuple):
  rows: pipeline.Rows
  stats: counts.MoeStats  # of the same rows in one batch, on one device
  found: specialisation.Trace


@pytest.fixture(scope="module", params=MESHES, ids=str)
def traced(request):
  """Two batches on a mesh; the last rows of the second are padding."""
  rows = toy_rows(LENGTHS, LABELS)
  model = toy_model(toy_config(eval_capacity_factor=1.0))
  batches = [rows.batch(numbers) for numbers in pipeline.eval_batches(range(len(rows)), 16)]
  assert len(batches) == 1 and not batches[0].segments_BL[-1].any()
  with jax.set_mesh(mesh_of()):
    stats = read(model, batches[0])[1]
  mesh = mesh_of(**request.param)
  with jax.set_mesh(mesh):
    choices = trace.compile_choices(model.config)
    found = trace.collect(choices, model, rows, list(range(len(rows))), 8, mesh)
  return Traced(rows, stats, found)


def test_the_trace_holds_every_token_in_its_row_and_place(traced):
  rows, found = traced.rows, traced.found
  assert found.token_T.tolist() == rows.stream_N[:-1].tolist()
  assert found.place_T.tolist() == [i % 9 for i in range(len(rows.stream_N) - 1)]
  assert found.row_T.tolist() == [i // 9 for i in range(len(rows.stream_N) - 1)]


def test_the_trace_labels_every_token_with_its_domain(traced):
  labels = np.repeat(LABELS, [length + 1 for length in LENGTHS])
  assert traced.found.domain_T.tolist() == labels.tolist()


def test_the_choices_add_up_to_the_counters(traced):
  found, stats = traced.found, traced.stats
  np.testing.assert_array_equal(found.routed_ZTE.sum(axis=1), stats.routed_E)
  np.testing.assert_array_equal(found.kept_ZTE.sum(axis=1), stats.kept_E)
  np.testing.assert_allclose(found.gate_ZTE.sum(axis=1), stats.importance_E, rtol=1e-5)


def test_some_choices_are_dropped_and_only_choices_are_kept(traced):
  found = traced.found
  assert not found.kept_ZTE[~found.routed_ZTE].any()
  assert found.kept_ZTE.sum() < found.routed_ZTE.sum()
