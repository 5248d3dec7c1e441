"""Documents that share a row: what another first document changes in the second."""

import math

import jax
import numpy as np
import pytest

from moe_jax.config import Dispatch, Priority, Router
from moe_jax.model import transformer
from moe_jax.moe.routing import Tokens
from tests.support.toy_text import toy_model
from tests.support.toys import slow_unless, toy_config

B, L, CUT = 64, 9, 4  # documents of four and of five tokens
CHOOSING = dict(router=Router.EXPERT_CHOICE, renormalize=False)
ALONE = {
  "capacity without limit": dict(eval_capacity_factor=math.inf),
  "enough capacity": dict(eval_capacity_factor=2.0),  # a slot for every token: E/K
  "grouped": dict(dispatch=Dispatch.GROUPED),
  "dense": dict(dispatch=Dispatch.DENSE),
}
TOGETHER = {
  "drops": dict(eval_capacity_factor=0.7),
  "drops by choice": dict(eval_capacity_factor=0.7, priority=Priority.CHOICE),
  "drops in one-hots": dict(eval_capacity_factor=0.7, dispatch=Dispatch.EINSUM),
  "experts choose": CHOOSING | dict(eval_capacity_factor=1.0),
  "experts choose, without slots": CHOOSING
  | dict(eval_capacity_factor=1.0, dispatch=Dispatch.GROUPED),
}


def second_documents(fields):
  """The logits of the second document of each row, after one and after another first document."""
  model, rng = toy_model(toy_config(**fields)), np.random.default_rng(0)
  one_BL, other_BL = (rng.integers(0, 23, (B, L)).astype(np.int32) for _ in range(2))
  other_BL[:, CUT:] = one_BL[:, CUT:]
  column_L = np.arange(L)
  segments_BL = np.tile(np.where(column_L < CUT, 1, 2).astype(np.int32), (B, 1))
  positions_BL = np.tile((column_L - CUT * (column_L >= CUT)).astype(np.int32), (B, 1))

  @jax.jit
  def run(tokens_BL):
    tokens = Tokens(tokens_BL, segments_BL, positions_BL)
    key = jax.random.key(0)
    out = transformer.forward(model.config, model.params, model.bias_ZE, tokens, key, train=False)
    return out.logits_BLV, 1 - out.stats.kept_E.sum() / out.stats.routed_E.sum()

  (one_BLV, dropped), (other_BLV, _) = map(run, (one_BL, other_BL))
  assert np.abs(one_BLV - other_BLV)[:, :CUT].max() > 0.1
  return one_BLV[:, CUT:], other_BLV[:, CUT:], dropped


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_where_nothing_drops_a_document_does_not_see_the_one_before(name, one_device):
  """But for the rounding of rows that stand elsewhere."""
  one_BLV, other_BLV, dropped = second_documents(ALONE[name])
  assert dropped == 0
  np.testing.assert_allclose(other_BLV, one_BLV, atol=1e-4)


@pytest.mark.parametrize("name", slow_unless(["drops"], TOGETHER))
def test_documents_compete_where_something_drops_or_experts_choose(name, one_device):
  """As docs/guide.md says; whoever changes that changes the page."""
  one_BLV, other_BLV, dropped = second_documents(TOGETHER[name])
  changed_BL = np.abs(other_BLV - one_BLV).max(axis=-1) > 1e-3
  assert changed_BL.mean() > 0.3
  assert (dropped > 0.1) == ("drops" in name)
