"""The grouped matmul's backends against a plain loop, odd sizes and gradients included."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, toy_config
from test_expert_parallel import set_up, toy_batch

from moe_jax import config as config_lib
from moe_jax import sharding
from moe_jax.config import Dispatch, GroupedMatmul
from moe_jax.kernels import blocked
from moe_jax.kernels import experts as expert_kernels
from moe_jax.kernels.experts import grouped_swiglu

BACKENDS = [GroupedMatmul.BLOCKED, GroupedMatmul.RAGGED_DOT]
SIZES = {
  "uneven": [7, 0, 50, 1, 33],
  "rows left over": [7, 0, 20, 1, 3],
  "all to one": [0, 0, 0, 91, 0],
  "nothing": [0, 0, 0, 0, 0],
  "equal": [18, 18, 18, 18, 18],
}
N, D, F, E = 91, 6, 4, 5


@pytest.fixture(params=[(4, 12), blocked._ROWS], ids=["small blocks", "blocks"], autouse=True)
def rows(request, monkeypatch):
  monkeypatch.setattr(blocked, "_ROWS", request.param)


def arrays(*shapes):
  rng = np.random.default_rng(0)
  return [np.float32(rng.normal(size=s)) for s in shapes]


def loop(x_ND, w_EDF, sizes):
  """[rows of y], in float64."""
  starts = np.cumsum(sizes) - sizes
  parts = [x_ND[a : a + n].astype(np.float64) @ w_EDF[e] for e, (a, n) in
           enumerate(zip(starts, sizes, strict=True))]  # fmt: skip
  return np.concatenate(parts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SIZES)
def test_equals_a_plain_loop(case, backend):
  sizes = np.array(SIZES[case])
  used = sizes.sum()
  x_ND, w_EDF, dy_NF = arrays((N, D), (E, D, F), (N, F))

  def product(x_ND, w_EDF):
    y_NF = expert_kernels.grouped_matmul(x_ND, w_EDF, jnp.array(sizes), backend)
    # What is past the experts' rows is undefined; reading it would be a bug.
    return jnp.where((jnp.arange(N) < used)[:, None], y_NF, 0)

  y_NF, vjp = jax.vjp(jax.jit(product), x_ND, w_EDF)
  dx_ND, dw_EDF = vjp(dy_NF)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # float32 sums
  close(y_NF[:used], loop(x_ND, w_EDF, sizes))
  close(dx_ND[:used], loop(dy_NF, w_EDF.swapaxes(1, 2), sizes))
  close(dx_ND[used:], 0)
  starts = np.cumsum(sizes) - sizes
  for e, (a, n) in enumerate(zip(starts, sizes, strict=True)):
    close(dw_EDF[e], x_ND[a : a + n].T.astype(np.float64) @ dy_NF[a : a + n])


@pytest.mark.parametrize("case", SIZES)
def test_the_blocked_swiglu_is_three_matmuls(case):
  """One pass over the rows, with its own gradients, against three ragged_dots."""
  sizes, used = jnp.array(SIZES[case]), sum(SIZES[case])
  x_ND, *weights, dy_ND = arrays((N, D), (E, D, F), (E, D, F), (E, F, D), (N, D))
  results = []
  for backend in BACKENDS:

    def ffn(x_ND, weights, backend=backend):
      y_ND = grouped_swiglu(x_ND, *weights, sizes, backend)
      return jnp.where((jnp.arange(N) < used)[:, None], y_ND, 0)

    y_ND, vjp = jax.vjp(jax.jit(ffn), x_ND, weights)
    results.append((y_ND, vjp(dy_ND)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def test_bfloat16_sums_in_float32():
  """Weight gradients of 600 rows in blocks: as one matmul's, not as a chain of rounded sums."""
  x_ND, dy_NF = (jnp.bfloat16(a) for a in arrays((600, D), (600, F)))
  w_EDF = jnp.ones((1, D, F), jnp.bfloat16)
  product = functools.partial(
    expert_kernels.grouped_matmul, sizes_E=jnp.array([600]), backend=GroupedMatmul.BLOCKED
  )
  _, dw_EDF = jax.vjp(jax.jit(product), x_ND, w_EDF)[1](dy_NF)
  want = np.float64(x_ND).T @ np.float64(dy_NF)
  assert dw_EDF.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(dw_EDF[0]), want, rtol=2**-8)  # one rounding


def test_remat_dots_keeps_the_blocked_activations():
  """The backward pass under remat=dots runs none of the forward pass's loops again."""
  loops = {}
  for remat in config_lib.Remat:
    config = toy_config(
      dispatch=Dispatch.GROUPED, capacity_factor=0.0, eval_capacity_factor=0.0,
      grouped_matmul=GroupedMatmul.BLOCKED,
    )  # fmt: skip
    config.model.remat = remat
    mesh, state, step, _ = set_up(config, {})
    with jax.set_mesh(mesh):
      lowered = step.lower(state, sharding.to_global(toy_batch(config), mesh))
    loops[remat.value] = lowered.as_text().count("stablehlo.while")
  # One more: the rows' places are found again, from one saved matmul (the router's).
  assert loops["dots"] <= loops["none"] + 1 < loops["full"] - 1


def test_auto_measures_once_and_remembers(tmp_path, monkeypatch, capsys):
  """In the middle of tracing a step on a mesh; the choice is printed and kept on disk."""
  monkeypatch.setattr(expert_kernels, "_chosen", {})
  monkeypatch.setattr(expert_kernels, "_cache_file", lambda: tmp_path / "grouped_matmul.json")
  with jax.set_mesh(mesh_of(expert=2)):
    config = toy_config(dispatch=Dispatch.GROUPED, capacity_factor=0.0, eval_capacity_factor=0.0)
    mesh, state, step, _ = set_up(config, dict(expert=2))
    step(state, sharding.to_global(toy_batch(config), mesh))
  printed = capsys.readouterr().out
  saved = json.loads((tmp_path / "grouped_matmul.json").read_text())
  assert len(saved) == 1 and set(saved.values()) <= {"blocked", "ragged_dot"}
  assert printed.count("grouped matmul     ") == 1 and " ms" in printed
  x_ND, w_EDF = jnp.zeros((8, 3)), jnp.zeros((2, 3, 5))
  expert_kernels.fastest(x_ND, w_EDF)
  assert "N8 D3 F5 E2" in capsys.readouterr().out
  # A new process reads the file and measures nothing.
  monkeypatch.setattr(expert_kernels, "_chosen", {})
  monkeypatch.setattr(expert_kernels, "_measure", None)
  expert_kernels.fastest(x_ND, w_EDF)
  assert not capsys.readouterr().out


def test_tokamax_missing_is_one_line():
  try:
    import tokamax  # noqa: F401
  except ImportError:
    with pytest.raises(config_lib.UserError, match=r"pip install tokamax.*grouped_matmul=auto"):
      expert_kernels.grouped_matmul(
        jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.array([2, 2]), GroupedMatmul.TOKAMAX
      )
  else:
    pytest.skip("tokamax is installed")
