"""Grouped matmul: rows sorted by expert, each times its own expert's weights; nothing drops.

One operation, several backends, because no single one is fast everywhere: XLA's `ragged_dot` does E
times the arithmetic on a CPU and has no fast lowering on CUDA. `auto` measures them once.
"""

import json
import pathlib
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import GroupedMatmul, UserError
from moe_jax.kernels import blocked, per_expert


class Experts(NamedTuple):
  """SwiGLU experts (2002.05202), compute dtype."""

  gate_EDF: jax.Array
  up_EDF: jax.Array
  down_EFD: jax.Array


def slots_swiglu(x_ERD: jax.Array, experts: Experts) -> jax.Array:
  """y_ERD: each expert on its own R rows, as many for every expert."""
  gate_ERF = jnp.einsum("ERD,EDF->ERF", x_ERD, experts.gate_EDF)
  up_ERF = jnp.einsum("ERD,EDF->ERF", x_ERD, experts.up_EDF)
  return jnp.einsum("ERF,EFD->ERD", jax.nn.silu(gate_ERF) * up_ERF, experts.down_EFD)


def grouped_matmul(
  x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, backend: GroupedMatmul
) -> jax.Array:
  """y_NF: the first sizes_E[0] rows of x_ND meet w_EDF[0], the next sizes_E[1] meet w_EDF[1].

  Rows past sum(sizes_E) must be finite; they come out undefined, NaN included, and take and give
  no gradient.

  Args:
    x_ND: rows, sorted by expert.
    w_EDF: weights, of the same dtype.
    sizes_E: int32, rows of each expert.
    backend: what computes it; `auto` measures the candidates once per shape and device.
  """
  x_ND, w_EDF, sizes_E = _vary_alike(x_ND, w_EDF, sizes_E)
  if backend is GroupedMatmul.AUTO:
    backend = fastest(x_ND, w_EDF)
  if backend is GroupedMatmul.BLOCKED:
    return blocked.matmul(x_ND, w_EDF, sizes_E)
  if backend is GroupedMatmul.TOKAMAX:
    varies = jax.typeof(x_ND).manual_axis_type  # its kernels do not infer it
    return _tokamax().ragged_dot(x_ND, w_EDF, group_sizes=sizes_E, manual_axis_type=varies)
  return jax.lax.ragged_dot(x_ND, w_EDF, sizes_E)


def grouped_swiglu(
  x_ND: jax.Array,
  gate_EDF: jax.Array | tuple[jax.Array, ...],
  up_EDF: jax.Array | tuple[jax.Array, ...],
  down_EFD: jax.Array | tuple[jax.Array, ...],
  sizes_E: jax.Array,
  backend: GroupedMatmul,
) -> jax.Array:
  """y_ND: (silu(x gate) * (x up)) down with each row's own expert (2002.05202).

  Three grouped matmuls; the blocked backend does them in one pass over the rows. Rows past
  sum(sizes_E) as in `grouped_matmul`. Weights that are a tuple, of an array for each expert with
  its output first, are for inference on a CPU (per_expert.py), whatever the backend.
  """
  if isinstance(gate_EDF, tuple):
    return per_expert.swiglu(x_ND, gate_EDF, up_EDF, down_EFD, sizes_E)
  arrays = _vary_alike(x_ND, gate_EDF, up_EDF, down_EFD, sizes_E)
  if backend is GroupedMatmul.AUTO:
    backend = fastest(x_ND, gate_EDF)
  if backend is GroupedMatmul.BLOCKED:
    return blocked.swiglu(*arrays)
  x_ND, gate_EDF, up_EDF, down_EFD, sizes_E = arrays
  gate_NF = grouped_matmul(x_ND, gate_EDF, sizes_E, backend)
  up_NF = grouped_matmul(x_ND, up_EDF, sizes_E, backend)
  return grouped_matmul(jax.nn.silu(gate_NF) * up_NF, down_EFD, sizes_E, backend)


def _vary_alike(*arrays: jax.Array) -> list[jax.Array]:
  # The transposed casts sum the weights' gradients over the devices that share them.
  axes = frozenset().union(*map(blocked.varying, arrays))
  return [blocked.vary(a, axes) for a in arrays]


def _tokamax() -> Any:
  try:
    import tokamax
  except ImportError:
    raise UserError(
      "config.model.moe.grouped_matmul=tokamax: that library is not installed; pip install "
      "tokamax, or set grouped_matmul=auto"
    ) from None
  return tokamax


# Without a measurement, and where several processes must agree.
_DEFAULT = {"cpu": GroupedMatmul.BLOCKED, "tpu": GroupedMatmul.RAGGED_DOT}
_CPU_ROWS = 1024  # ragged_dot's E-fold work makes the measurement long on a CPU

_chosen: dict[str, GroupedMatmul] = {}  # by shape and device, of this process


def fastest(x_ND: jax.Array, w_EDF: jax.Array) -> GroupedMatmul:
  """The backend with the shortest forward and backward SwiGLU for these shapes on this device.

  Measured once, printed, and kept beside jax's compilation cache where there is one. Several
  processes have to compile the same program, so they take their platform's default unmeasured.
  """
  device = jax.devices()[0]
  platform = device.platform
  if jax.process_count() > 1:
    return _DEFAULT.get(platform, GroupedMatmul.RAGGED_DOT)
  (N, D), (E, _, F) = x_ND.shape, w_EDF.shape
  key = f"{device.device_kind} jax {jax.__version__} N{N} D{D} F{F} E{E} {x_ND.dtype}"
  if key not in _chosen:
    _chosen.update(_read_cache())
  if key not in _chosen:
    rows = min(N, _CPU_ROWS) if platform == "cpu" else N
    times: dict[GroupedMatmul, float] = {}
    # A thread of its own has none of the caller's trace and mesh.
    thread = threading.Thread(target=_measure, args=(rows, D, F, E, x_ND.dtype, times))
    thread.start()
    thread.join()
    _chosen[key] = min(times, key=times.__getitem__)
    listed = ", ".join(f"{b.value} {1e3 * t:.2f} ms" for b, t in times.items())
    print(f"grouped matmul     {_chosen[key].value} for {key} (of {listed}, {rows} rows)")
    _write_cache()
  return _chosen[key]


def _measure(N, D, F, E, dtype, times: dict[GroupedMatmul, float]) -> None:
  candidates = [GroupedMatmul.BLOCKED, GroupedMatmul.RAGGED_DOT]
  if jax.devices()[0].platform != "cpu":
    candidates = [GroupedMatmul.RAGGED_DOT]
    try:
      _tokamax()
      candidates.append(GroupedMatmul.TOKAMAX)
    except UserError:
      pass
  rng = np.random.default_rng(0)
  shapes = ((N, D), (E, D, F), (E, D, F), (E, F, D))
  arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
  sizes_E = jnp.asarray(rng.multinomial(N, rng.dirichlet(np.full(E, 10.0))), jnp.int32)
  for backend in candidates:

    def loss(*arrays, backend=backend):
      return jnp.sum(grouped_swiglu(*arrays, sizes_E, backend).astype(jnp.float32))

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    try:
      jax.block_until_ready(step(*arrays))
    except Exception as error:  # a kernel that does not know this device or shape
      print(f"grouped matmul     {backend.value} does not run here: {str(error).splitlines()[0]}")
      continue
    seconds = []
    for _ in range(3):
      start = time.perf_counter()
      jax.block_until_ready(step(*arrays))
      seconds.append(time.perf_counter() - start)
    times[backend] = min(seconds)


def _cache_file() -> pathlib.Path | None:
  directory = jax.config.jax_compilation_cache_dir
  return pathlib.Path(directory) / "grouped_matmul.json" if directory else None


def _read_cache() -> dict[str, GroupedMatmul]:
  path = _cache_file()
  if path is None or not path.exists():
    return {}
  try:
    return {key: GroupedMatmul(value) for key, value in json.loads(path.read_text()).items()}
  except ValueError:  # cut short or from another version: measure again
    return {}


def _write_cache() -> None:
  path = _cache_file()
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = _read_cache() | _chosen
    path.write_text(json.dumps({k: v.value for k, v in merged.items()}, indent=2) + "\n")
