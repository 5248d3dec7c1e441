"""Any router, any dispatcher, any mesh: one answer, the NumPy oracle's."""

import dataclasses
import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Dispatch, Exchange, ExchangeFallback, GroupedMatmul, Model, Router
from moe_jax.kernels import blocked
from moe_jax.kernels.experts import Experts
from moe_jax.moe import counts
from moe_jax.moe import layer as layer_lib
from moe_jax.moe.balance import balance_loss, cv_squared_plus_one
from moe_jax.moe.routing import LayerInputs, Mode
from tests.support import routings, unread
from tests.support.routings import ROUTINGS, E
from tests.support.toys import mesh_of

MESHES = {
  "one": {},
  "expert2": dict(expert=2),
  "expert4": dict(expert=4),
  "expert4-data2": dict(expert=4, data=2),
  "expert2-fsdp2": dict(expert=2, fsdp=2),
  "expert2-tensor2": dict(expert=2, tensor=2),
  "expert2-fsdp2-tensor2": dict(expert=2, fsdp=2, tensor=2),
  "expert8": dict(expert=8),
}
# name: dropless, fields
DISPATCHES = {
  "gather": (False, dict(dispatch=Dispatch.GATHER)),
  "einsum": (False, dict(dispatch=Dispatch.EINSUM)),
  "gather-nothing-drops": (True, dict(dispatch=Dispatch.GATHER)),
  "dense": (True, dict(dispatch=Dispatch.DENSE)),
  "blocked-all-gather": (
    True,
    dict(
      dispatch=Dispatch.GROUPED,
      grouped_matmul=GroupedMatmul.BLOCKED,
      exchange=Exchange.ALL_GATHER,
    ),
  ),
  "ragged-dot-all-to-all": (
    True,
    dict(
      dispatch=Dispatch.GROUPED,
      grouped_matmul=GroupedMatmul.RAGGED_DOT,
      exchange=Exchange.ALL_TO_ALL,
    ),
  ),
  "gather-chunks": (False, dict(dispatch=Dispatch.GATHER, exchange_chunks=3)),
}
_OVERFLOWS = dict(exchange_factor=0.5, exchange_fallback=ExchangeFallback.EXACT)
DISPATCHES |= {
  "all-to-all-overflows": (True, DISPATCHES["ragged-dot-all-to-all"][1] | _OVERFLOWS),
  "blocked-all-gather-chunks": (
    True,
    DISPATCHES["blocked-all-gather"][1] | dict(exchange_chunks=3),
  ),
}


class Outputs(NamedTuple):
  y_BLD: jax.Array
  stats: counts.MoeStats
  choices: counts.Choices
  balance: jax.Array


class Answer(NamedTuple):
  """The package's, where the oracle has routings.Expected."""

  outputs: Outputs
  gradients: dict[str, jax.Array]  # by x_BLD and the weights


def layer_loss(x_BLD, weights, rest, cotangent_BLD, moe):
  """oracle.loss by the package; `rest` is the oracle's inputs that have no gradient."""
  real_BL, ids_BL, noise_BLE, bias_E = rest
  logits_BLE = jnp.einsum("BLD,DE->BLE", x_BLD, weights["router_DE"])
  extra = {}
  if moe.router is Router.NOISY_TOPK:
    scale_BLE = jax.nn.softplus(jnp.einsum("BLD,DE->BLE", x_BLD, weights["noise_DE"])) + 0.01
    extra = {"noise_scale": scale_BLE}
  inputs = LayerInputs(logits_BLE, real_BL, ids_BL, bias_E, noise_BLE, extra)
  names = ("gate_EDF", "up_EDF", "down_EFD")
  experts = Experts(*(weights[n] for n in names))
  y_BLD, stats, choices = layer_lib.on_mesh(
    x_BLD, inputs, experts, Model(moe=moe), Mode(train=True, trace=True)
  )
  stacked = jax.tree.map(lambda s: s[None], stats)
  balance = balance_loss(stacked.routed_E, stacked.prob_E, stacked.tokens)[0]
  loss = jnp.sum(y_BLD * cotangent_BLD) + 3 * balance + stats.z / stats.tokens
  loss += 2 * stats.sequence_balance / stats.sequences
  loss += cv_squared_plus_one(stacked.importance_E)[0]
  if moe.router is Router.NOISY_TOPK:
    loss += cv_squared_plus_one(stacked.load_E)[0]
  return loss, Outputs(y_BLD, stats, choices, balance)


def run(moe, axes, padding=None) -> Answer:
  """On a mesh; with numbers of the size of `padding` at all that stands at padding."""
  values, cotangent_BLD = routings.inputs()
  if padding is not None:
    values = dataclasses.replace(values, **at_padding(values, padding))
  bias_E = values.bias_E if moe.bias_update_rate else np.zeros(E)
  with jax.set_mesh(mesh_of(**axes)):
    to32 = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
    rest = (values.real_BL, values.ids_BL, *to32((values.noise_BLE, bias_E)))
    loss = functools.partial(layer_loss, moe=moe)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, outputs), (dx_BLD, dweights) = step(
      *to32((values.x_BLD, values.weights)), rest, to32(cotangent_BLD)
    )
  return Answer(outputs, {"x_BLD": dx_BLD} | dweights)


def at_padding(values, size):
  pad_BL1, rng = ~values.real_BL[..., None], np.random.default_rng(3)
  ids_BL = np.where(values.real_BL, values.ids_BL, rng.integers(0, 20, (values.ids_BL.shape)))
  arrays = {"x_BLD": values.x_BLD, "noise_BLE": values.noise_BLE}
  junk = {n: np.where(pad_BL1, size * rng.normal(size=a.shape), a) for n, a in arrays.items()}
  return junk | {"ids_BL": ids_BL.astype(np.int32)}


def assert_close(got, want, name=""):
  """float32 sums of some tens of terms of order 1 to 10."""
  np.testing.assert_allclose(got, want, rtol=3e-4, atol=3e-4, err_msg=name)


def assert_counts_equal(outputs, want):
  """Whole numbers, and which token went where."""
  stats, choices = outputs.stats, outputs.choices
  for name in ("routed_E", "kept_E", "kept_K", "routed_P", "kept_P"):
    np.testing.assert_array_equal(getattr(stats, name), getattr(want, name), err_msg=name)
  np.testing.assert_array_equal(choices.kept_BLE.reshape(-1, E), want.kept_TE)
  np.testing.assert_array_equal(choices.routed_BLE.reshape(-1, E), want.gate_TE > 0)
  assert stats.tokens == want.tokens and stats.sequences == want.sequences
  assert stats.overflow == 0


def assert_statistics_close(outputs, want):
  assert_close(outputs.choices.gate_BLE.reshape(-1, E), want.gate_TE, "gates")
  for name in (
    "prob_E",
    "importance_E",
    "gate_kept",
    "load_E",
    "z",
    "entropy",
    "sequence_balance",
  ):
    assert_close(getattr(outputs.stats, name), getattr(want, name), name)
  assert_close(outputs.balance, want.balance, "balance")


def assert_gradients_close(gradients, slopes):
  """A gradient that is wrong in one number has a wrong slope along every random direction."""
  for name, wanted in slopes.items():
    got = [np.sum(np.float64(gradients[name]) * along.shares) for along in wanted]
    np.testing.assert_allclose(got, [w.slope for w in wanted], rtol=5e-5, atol=3e-4, err_msg=name)


def assert_is_the_oracles(got, want):
  assert_close(got.outputs.y_BLD, want.result.y_BLD)  # so the same assignments were dropped
  assert_counts_equal(got.outputs, want.result)
  assert_statistics_close(got.outputs, want.result)
  assert_gradients_close(got.gradients, want.slopes)


def grid():
  """Every routing x dispatch on a mesh, by turns, so that every dispatch is on every mesh.

  MOE_JAX_GRID=all takes every mesh for all. Everyday: each routing once, each dispatch twice, each
  mesh at least once.
  """
  meshes = list(MESHES)
  for row, routing in enumerate(ROUTINGS):
    for column, dispatch_name in enumerate(DISPATCHES):
      turn = meshes[(row + 3 * column) % len(meshes)]
      for mesh in meshes if os.environ.get("MOE_JAX_GRID") == "all" else [turn]:
        everyday = mesh == turn and column == row // 2 % len(DISPATCHES)
        yield pytest.param(
          routing,
          dispatch_name,
          mesh,
          id=f"{routing}-{dispatch_name}-{mesh}",
          marks=[] if everyday else [pytest.mark.slow],
        )


@pytest.fixture
def small_blocks(monkeypatch):
  """So that a few rows make several full blocks and a rest; fewer sizes compile sooner."""
  monkeypatch.setattr(blocked, "_BLOCK_ROWS", (4, 12))


# What a dispatcher has of rows that nobody reads.
UNREAD = {
  "gather": {"rows", "outputs"},
  "einsum": {"outputs"},
  "gather-nothing-drops": {"rows", "outputs"},
  "dense": {"outputs"},
  "blocked-all-gather": {"rows", "outputs", "scratch"},
  "ragged-dot-all-to-all": {"rows", "outputs", "buffers"},
  "all-to-all-overflows": {"rows", "outputs", "buffers"},
  "blocked-all-gather-chunks": {"rows", "outputs", "scratch"},
  "gather-chunks": {"rows", "outputs"},
}


@pytest.mark.parametrize(("routing", "dispatch_name", "mesh"), list(grid()))
def test_every_path_equals_the_oracle(routing, dispatch_name, mesh, monkeypatch, small_blocks):
  """Whatever stands at padding and in rows of nothing, which the oracle does not have.

  Slots without a token, rows past the last, buffers, and scratch.
  """
  dropless, fields = DISPATCHES[dispatch_name]
  moe = routings.moe_config(routing, dropless=dropless, **fields)
  filled = unread.fill(monkeypatch, moe)
  got = run(moe, MESHES[mesh], padding=unread.JUNK)
  assert filled == UNREAD[dispatch_name] - ({"buffers"} if mesh == "one" else set())
  assert_is_the_oracles(got, routings.expected(routing, dropless))


def test_a_path_without_junk_equals_the_oracle():
  """If this holds where the grid fails, something read what it should not."""
  assert_is_the_oracles(
    run(routings.moe_config("deepseek"), {}), routings.expected("deepseek", False)
  )


# What the grid's cases must have, or an error in the package could not show.


@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_grid_has_uneven_loads_drops_and_gradients(routing, dropless):
  """When experts choose, each takes what it can."""
  wanted = routings.expected(routing, dropless)
  dropped = 1 - np.mean([kept for _, _, kept in wanted.assignments])
  if dropless or routing == "expert-choice":
    assert dropped == 0
  else:
    assert 0.05 < dropped < 0.6
  loads_E = wanted.result.routed_E
  assert loads_E.max() > 1.15 * loads_E.mean() or routing == "expert-choice"
  for name, slopes in wanted.slopes.items():
    steep = max(abs(along.slope) for along in slopes)
    assert steep > 1 or (name == "noise_DE" and routing != "noisy"), name
