"""Evaluation: the loss of each domain, and the balancing bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training import evaluator, losses
from tests.support.toy_text import S, read, toy_model, toy_rows
from tests.support.toys import (
  biased_config,
  mesh_of,
  set_up,
  toy_batch,
  toy_config,
)


def test_bias_is_used_and_not_moved_by_evaluation():
  from moe_jax.training.evaluator import eval_step

  config = biased_config()
  mesh, state, _ = set_up(config, {})
  batch, bytes_V = toy_batch(config), np.ones(24, np.int32)
  push_ZE = np.zeros((2, 4), np.float32)
  push_ZE[:, 1] = 10  # every token's first choice
  with jax.set_mesh(mesh):
    run = jax.jit(lambda bias: eval_step(state.params, bias, batch, bytes_V, model=config.model))
    plain, pushed = run(state.bias_ZE), run(jnp.array(push_ZE))
  tokens_Z = np.asarray(plain.sums.moe.tokens)
  assert (np.asarray(plain.sums.moe.routed_E)[:, 1] < tokens_Z).all()
  np.testing.assert_array_equal(np.asarray(pushed.sums.moe.routed_E)[:, 1], tokens_Z)


def test_loss_of_each_domain(one_device):
  """Against sums over documents in Python; a document of no domain is in the whole alone."""
  config = toy_config()
  config.eval.batch_size = 4
  mesh, rows = mesh_of(), toy_rows([20, 3, 9, 14], [0, 1, -1, 0], domains=("a", "b", "never"))
  model = toy_model(config)
  one = evaluator.Evaluator(config, rows, mesh, 0)
  total = one.total(model.params, model.bias_ZE)
  domains = one.by_domain(total.domains)
  assert list(domains) == ["a", "b"]
  # Nats of each target in the order of the stream; document d has lengths[d] + 1 of them.
  batch = rows.batch(range(len(rows)))
  logits_BLV = read(model, batch)[0]
  nll_N = np.asarray(losses.token_nll(logits_BLV, batch.targets_BL)[0])[batch.segments_BL > 0]
  targets_N = rows.stream_N[1:]
  pieces = np.split(np.arange(len(targets_N)), np.cumsum([21, 4, 10]))
  for name, members in {"a": [0, 3], "b": [1]}.items():
    where = np.concatenate([pieces[d] for d in members])
    num_bytes = sum(int(i) % 3 if i != S else 0 for i in targets_N[where])
    found = domains[name]
    assert (found["tokens"], found["bytes"]) == (len(where), num_bytes)
    assert found["loss"] == pytest.approx(nll_N[where].mean(), rel=1e-5)
    bits = nll_N[where].sum() / np.log(2) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
  assert (
    total.sums.targets == len(targets_N) == domains["a"]["tokens"] + domains["b"]["tokens"] + 10
  )
