"""The price of not seeing ahead: rows cut by hand, losses with the future hidden."""

import numpy as np
import pytest

from moe_jax.analysis import causal
from moe_jax.config import Dispatch, Priority, Router, override
from moe_jax.data import pipeline
from moe_jax.errors import UserError
from moe_jax.moe import dispatch
from tests.support.toy_text import S, read, toy_model, toy_rows
from tests.support.toys import mesh_of, toy_config


def test_cut_by_hand():
  row = pipeline.Batch(
    *(
      np.array([x], np.int32)
      for x in ([9, S, 1, 2, 3, 4], [S, 1, 2, 3, 4, 5], [1, 2, 2, 2, 2, 2], [0, 0, 1, 2, 3, 4])
    )
  )
  other = row._replace(tokens_BL=np.array([[11, 12, 13, 14, S, 15]], np.int32))
  both = pipeline.Batch(*(np.concatenate([x, x, x]) for x in row))
  others = pipeline.Batch(*(np.concatenate([x, x, x]) for x in other))
  cut = causal.cut(both, others, np.array([2, 0, 5]), S)
  assert cut.tokens_BL.tolist() == [
    [9, S, 1, 14, S, 15],
    [9, 12, 13, 14, S, 15],
    [9, S, 1, 2, 3, 4],
  ]
  assert cut.segments_BL.tolist() == [[1, 2, 2, 3, 4, 4], [1, 2, 2, 2, 3, 3], [1, 2, 2, 2, 2, 2]]
  assert cut.positions_BL.tolist() == [[0, 0, 1, 0, 0, 1], [0, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 4]]
  np.testing.assert_array_equal(cut.targets_BL, both.targets_BL)


DROPLESS = dict(dispatch=Dispatch.GROUPED)
CHOOSING = dict(router=Router.EXPERT_CHOICE, renormalize=False, eval_capacity_factor=1.0)


@pytest.mark.parametrize(
  ("fields", "is_causal"),
  [
    (dict(eval_capacity_factor=1.0), True),
    (dict(priority=Priority.CHOICE, eval_capacity_factor=1.0), False),
    pytest.param(DROPLESS, True, marks=pytest.mark.slow),
    pytest.param(dict(group_size=18, eval_capacity_factor=1.0), True, marks=pytest.mark.slow),
    pytest.param(CHOOSING | dict(group_size=18), False, marks=pytest.mark.slow),
  ],
)
def test_hiding_the_future_changes_what_depends_on_it(fields, is_causal, one_device):
  """Bit for bit nothing where routing is causal."""
  config = toy_config(**fields)
  config = override(config, {"model.moe": dispatch.with_slots(config.model.moe)})
  model, rows = toy_model(config), toy_rows([30, 3, 17, 25], [0, 1, 0, 1])
  hidden_RL, forced_RL = causal.causal_losses(model, rows, [0, 2, 4, 6], 8, mesh_of())
  np.testing.assert_array_equal(hidden_RL[:, -1], forced_RL[:, -1])  # nothing is left to hide
  assert (hidden_RL == forced_RL).all() == is_causal
  if not is_causal:
    assert np.abs(hidden_RL - forced_RL).max() > 1e-3
  assert forced_RL.min() > 0 and hidden_RL.min() > 0


def test_a_hidden_future_is_another_rows_text(one_device):
  """One token's loss from one row that is put together by hand; experts choose, so it counts."""
  model, rows = toy_model(toy_config(**CHOOSING)), toy_rows([30, 30, 17], [0, 1, 0])
  hidden_RL, forced_RL = causal.causal_losses(model, rows, [1, 5], 8, mesh_of())
  mine, other, t = rows.batch([1]), rows.batch([5]), 4
  assert (mine.segments_BL == 1).all() and (other.segments_BL == 1).all()  # no border inside
  column_L = np.arange(9)[None]
  put_together = pipeline.Batch(
    np.where(column_L <= t, mine.tokens_BL, other.tokens_BL),
    mine.targets_BL,
    np.where(column_L <= t, 1, 2).astype(np.int32),
    np.where(column_L <= t, column_L, column_L - t - 1).astype(np.int32),
  )
  both = pipeline.Batch(*(np.concatenate(pair) for pair in zip(put_together, mine, strict=True)))
  logits_BLV = np.asarray(read(model, both)[0], np.float64)
  for logits_V, found in zip(logits_BLV[:, t], (hidden_RL[0, t], forced_RL[0, t]), strict=True):
    nll = np.log(np.exp(logits_V).sum()) - logits_V[mine.targets_BL[0, t]]
    assert found == pytest.approx(nll, abs=1e-5)  # float32 rounding
  assert abs(hidden_RL[0, t] - forced_RL[0, t]) > 1e-3


def test_causal_routing_has_no_gap(one_device):
  config = toy_config()
  rows = toy_rows([30, 20], [0, 1])
  found = causal.measure_losses(toy_model(config), rows, 3, 8, mesh_of())
  assert found["tokens"] == 3 * 9 and found["gap"] == 0.0
  assert found["loss"] == found["teacher_forced_loss"] > 0


def test_one_row_is_too_little_text(one_device):
  config = toy_config()
  with pytest.raises(UserError, match="needs at least 2"):
    causal.measure_losses(toy_model(config), toy_rows([12], [0]), 3, 8, mesh_of())
