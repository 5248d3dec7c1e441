"""Which device holds which experts: heavy ones are spread when a checkpoint is read.

A model whose experts have changed places, with all that belongs to them, is the same model. The
workdir records who stands where, so that metrics and evaluations go on by the experts' old numbers.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import sharding
from moe_jax.config import Config, override
from moe_jax.errors import UserError
from moe_jax.model import cost
from moe_jax.model.pattern import layer_places, moe_layers
from moe_jax.moe.routers import ROUTERS
from moe_jax.storage import workdir as workdir_lib
from moe_jax.training import metrics
from moe_jax.training import setup as setup_lib
from moe_jax.training.setup import Setup, TrainState


def balanced(load_E: np.ndarray, devices: int) -> np.ndarray:
  """Returns the experts in the order of their new places, int [E]; each device has equally many.

  Greedy: the heaviest expert that is left goes to the device with the least load that has room.
  The order stays where this does not lighten the device with the most.
  """
  held: list[list[int]] = [[] for _ in range(devices)]
  for expert in np.argsort(-load_E, kind="stable"):
    room = [own for own in held if len(own) < len(load_E) // devices]
    min(room, key=lambda own: load_E[own].sum()).append(int(expert))
  order_E = np.concatenate([sorted(own) for own in held]).astype(np.int32)
  before, after = (metrics.device_overload(x[None], devices) for x in (load_E, load_E[order_E]))
  return order_E if after < before else np.arange(len(load_E), dtype=np.int32)


def check(config: Config) -> None:
  """Raises a UserError where experts cannot change places, or where that would change nothing."""
  moe, flag = config.model.moe, "--placement=balanced"
  spec = ROUTERS[moe.router]
  if config.mesh.expert == 1 or not moe.num_experts:
    raise UserError(f"{flag}: config.mesh.expert=1 holds all experts on each device; drop the flag")
  if moe.expert_groups > 1 or spec.noise is not None or not spec.load_is_learned:
    raise UserError(
      f"{flag}: config.model.moe.router={moe.router.value} with expert_groups={moe.expert_groups} "
      "chooses by an expert's number, so that in another place it is another model; drop the flag"
    )


def place(state: TrainState, setup: Setup, path: pathlib.Path, start: int) -> TrainState:
  """Returns the state with its experts spread by the loads that it has measured; records it."""
  load_ZE, devices = np.asarray(state.load_ZE), setup.config.mesh.expert
  order_ZE = np.stack([balanced(load_E, devices) for load_E in load_ZE])
  before = metrics.device_overload(load_ZE, devices)
  after = metrics.device_overload(np.take_along_axis(load_ZE, order_ZE, 1), devices)
  if jax.process_index() == 0:
    step, step_before = (_step(setup.config, float(x.mean())) for x in (after, before))
    print(
      f"placement          of a layer's rows the busiest device has {after.mean():.2f} times the "
      f"mean, was {before.mean():.2f}; at most {after.max():.2f}, was {before.max():.2f}; a step "
      f"should take {step:.2f} times as long as with even loads, was {step_before:.2f}"
    )
    place_ZE, old_ZE = np.argsort(order_ZE, axis=1), recorded(path, start)
    record(path, start, place_ZE if old_ZE is None else np.take_along_axis(place_ZE, old_ZE, 1))
  return permuted(state, order_ZE, setup.config, lambda c: setup_lib.make(c, setup.mesh).shapes)


def _step(config: Config, overload: float) -> float:
  """Returns the time of a step by FLOPs, as a multiple of that in which devices have equal rows."""
  counts, moe = cost.count(config), config.model.moe
  experts = (counts.total - counts.active) * moe.top_k / max(moe.num_experts - moe.top_k, 1)
  return 1 + 6 * experts / counts.flops_per_token * (overload - 1)


def permuted(
  tree: Any, order_ZE: np.ndarray, config: Config, shapes_of: Callable[[Config], Any]
) -> Any:
  """Returns a tree of a model's arrays, whose memory it takes, with the experts in another order.

  Args:
    tree: parameters and what goes with them: moments, biases, loads.
    order_ZE: the place of each expert so far.
    config: of the run.
    shapes_of: config -> shapes of the tree. An array has experts where one more makes it larger.
  """
  more = {"model.moe.num_experts": config.model.moe.num_experts + 1}
  places, layers = layer_places(config.model), moe_layers(config.model)

  def one(path: tuple[Any, ...], x: jax.Array, grown: Any) -> jax.Array:
    sizes = enumerate(zip(x.shape, grown.shape, strict=True))
    axis = next((i for i, (size, larger) in sizes if size != larger), 0)
    if not axis:
      return x
    names = sharding.path_of(path)
    stack = names[names.index("scans") :][:4] if "scans" in names else ()
    rows = [z for z, layer in enumerate(layers) if not stack or places[layer][0] == stack]

    # A layer at a time, because a device may get the experts of all.
    def move(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
      return jnp.take(layer[0], layer[1], axis=axis - 1)

    return jax.lax.map(move, (x, jnp.asarray(order_ZE)[np.array(rows)]))

  grown = shapes_of(override(config, more))

  def moved(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(one, tree, grown)

  placed = jax.tree.map(lambda x: x.sharding, tree)
  return jax.jit(moved, out_shardings=placed, donate_argnums=0)(tree)


def recorded(path: pathlib.Path, step: int) -> np.ndarray | None:
  """Returns the place of each expert, int [Z, E], in a saved step; None: that of its number."""
  found = workdir_lib.read_object(path / workdir_lib.PLACEMENT).get("placements", [])
  return next((np.array(p["place_ZE"]) for p in found[::-1] if p["step"] < step), None)


def record(path: pathlib.Path, start: int, place_ZE: np.ndarray | None = None) -> None:
  """Forgets what was placed from step `start` on, and records a placement there."""
  found = workdir_lib.read_object(path / workdir_lib.PLACEMENT).get("placements", [])
  kept = [one for one in found if one["step"] < start]
  if place_ZE is not None:
    kept.append({"step": start, "place_ZE": place_ZE.tolist()})
  if kept or found:
    workdir_lib.write_object(path / workdir_lib.PLACEMENT, {"placements": kept})
