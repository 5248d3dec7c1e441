"""Makes an MoE model of a dense run's weights (sparse upcycling, 2212.05055):

python -m moe_jax.training.upcycle --from=W_DENSE[:STEP] --config=FILE --workdir=W
    [--method=copy|noise|drop]
python train.py --config=FILE --workdir=W_MOE --init_from=W

Every expert begins as the dense feed-forward. Where an expert is n times narrower than it, the
feed-forward is split into n parts, and each n experts hold one copy (2410.07524). Their routers
begin alike, so that a token chooses all parts of a copy; so the parts must divide top_k.

  copy    nothing more
  noise   each expert's weights are plus --amount of their standard deviation, times N(0, 1)
  drop    --amount of each expert's hidden units begin anew, drawn with the mean and the standard
          deviation of the dense weights (drop-upcycling, 2502.19261)

With `copy` the MoE model computes what the dense one does, to rounding, where the gates of a token
sum to 1 (renormalize, with top_k above 1) and nothing is dropped. The command says what holds.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import sharding
from moe_jax.config import Config, Model, override
from moe_jax.config.run import other_model
from moe_jax.data import tokenizers
from moe_jax.errors import UserError
from moe_jax.model import pattern, transformer
from moe_jax.moe import dispatch, routers, routing, validation
from moe_jax.start import command_line, progress, startup
from moe_jax.storage import weights as weights_lib
from moe_jax.storage import workdir as workdir_lib
from moe_jax.storage.weights import Weights
from moe_jax.training import setup as setup_lib

METHODS = {"copy": 0.0, "noise": 0.1, "drop": 0.5}  # and the default of --amount
Path = tuple[str, ...]


def check_upcycling(dense: Model, model: Model) -> int:
  """Returns into how many parts the dense feed-forward is split.

  Raises:
    UserError: names the fields because of which `model` cannot be made of `dense`.
  """
  moe = model.moe
  if dense.moe.num_experts:
    raise UserError(f"--from: that run has {dense.moe.num_experts} experts; name a dense run")
  if not moe.num_experts:
    raise UserError("--config: config.model.moe.num_experts=0; name a config with experts")
  if moe.shared_experts:
    raise UserError(
      f"config.model.moe.shared_experts={moe.shared_experts}: a shared expert beside copies of the "
      "feed-forward would count it twice; set shared_experts=0"
    )
  other = other_model(dense, model, "dense")
  free = ("model.moe.", "model.ffn_dim")
  words = [text for name, text in other.items() if not name.startswith(free)]
  if words:
    raise UserError(f"--config: the decoder is not that of the dense run: {', '.join(words)}")
  parts = dense.ffn_dim // moe.expert_dim
  if dense.ffn_dim % moe.expert_dim:
    raise UserError(
      f"config.model.moe.expert_dim={moe.expert_dim} does not divide the dense run's ffn_dim="
      f"{dense.ffn_dim}; a feed-forward is split into equal parts"
    )
  for field in ("num_experts", "top_k"):
    if getattr(moe, field) % parts:
      raise UserError(
        f"config.model.moe.{field}={getattr(moe, field)} is not a multiple of the {parts} parts "
        f"into which ffn_dim={dense.ffn_dim} is split; a token needs all of them"
      )
  if parts > 1 and not routers.ROUTERS[moe.router].takes_bias:
    raise UserError(
      f"config.model.moe.router={moe.router.value} does not choose by score alone, so a token "
      f"would not get all {parts} parts of a copy; use router=topk, or expert_dim={dense.ffn_dim}"
    )
  if moe.num_experts // moe.expert_groups % parts:
    raise UserError(
      f"config.model.moe.expert_groups={moe.expert_groups}: a group has {moe.num_experts} / "
      f"{moe.expert_groups} experts, and a copy {parts}; a token that has one of its groups would "
      "not get all parts of a copy"
    )
  if len(pattern.moe_layers(model)) < model.num_layers and model.ffn_dim != dense.ffn_dim:
    raise UserError(
      f"config.model.ffn_dim={model.ffn_dim}: the dense run's is {dense.ffn_dim}, and some layers "
      "stay dense"
    )
  return parts


def is_exact(model: Model, method: str) -> bool:
  """Returns whether the MoE model begins as the same function as the dense one."""
  return method == "copy" and model.moe.renormalizes


def upcycle(
  params: Any, dense: Model, model: Model, method: str, amount: float, key: jax.Array
) -> Any:
  """Returns the parameters of `model`, made of those of `dense`.

  Args:
    params: the nnx state of the dense Transformer, float32.
    dense: its config.
    model: the config with experts; `check` has accepted it.
    method: of METHODS.
    amount: of noise, or of the hidden units that begin anew.
    key: draws the routers, the noise and the new units.
  """
  parts = check_upcycling(dense, model)
  old = {sharding.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  old_places, places = pattern.layer_places(dense), pattern.layer_places(model)

  def layer(number: int, name: Path, shape: tuple[int, ...]) -> jax.Array:
    """One layer's parameter of that name."""
    where, place = old_places[number]
    if where + name in old:
      return old[where + name][place]
    layer_key = jax.random.fold_in(key, number)
    if name[-1] == "router_DE":
      return _router(layer_key, shape, parts)
    dense_name = {"gate_EDF": "gate_DF", "up_EDF": "up_DF", "down_EFD": "down_FD"}.get(name[-1])
    if dense_name is None:
      return jnp.zeros(shape)  # other parameters of a router
    source = old[(*where, *name[:-1], dense_name)][place]
    inner = dense_name.rsplit("_", 1)[-1].index("F")
    split = jnp.stack(jnp.split(source, parts, axis=inner))  # [parts, ...]
    copies = jnp.tile(split, (model.moe.num_experts // parts, 1, 1))
    if method != "copy":
      copies = _changed(copies, source, 1 + inner, method, amount, layer_key, dense_name)
    if dense_name == "down_FD" and model.moe.renormalizes:
      # The gates of a token sum to gate_scale; each part needs a sum of 1.
      copies = copies * (parts / model.moe.gate_scale)
    return copies

  def stacked(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    name = sharding.path_of(path)
    if name in old and not name[0].startswith("scans"):
      return old[name]
    where, below = name[:4], name[4:]
    numbers = [number for number, (at, _) in enumerate(places) if at == where]
    return jnp.stack([layer(number, below, leaf.shape[1:]) for number in numbers])

  return jax.tree_util.tree_map_with_path(stacked, transformer.abstract_params(model))


def _router(key: jax.Array, shape: tuple[int, ...], parts: int) -> jax.Array:
  """Returns a router [D, E] that gives the experts of one copy the same logits."""
  D, E = shape
  sizes = {"D": D, "E": E // parts}
  draw: Callable[[Any, dict[str, int]], jax.Array] = routing.ROUTER_DE.initial
  return jnp.repeat(draw(nnx.Rngs(key), sizes), parts, axis=1)


def _changed(
  copies: jax.Array,
  source: jax.Array,
  hidden: int,
  method: str,
  amount: float,
  key: jax.Array,
  name: str,
) -> jax.Array:
  """Returns the experts [E, ...] with noise, or with new hidden units."""
  units_key, values_key = jax.random.split(key)
  values_key = jax.random.fold_in(values_key, ("gate_DF", "up_DF", "down_FD").index(name))
  drawn = jax.random.normal(values_key, copies.shape)
  if method == "noise":
    return copies + amount * jnp.std(source) * drawn
  experts, F = copies.shape[0], copies.shape[hidden]
  # The same units of gate, up and down.
  order = jax.vmap(lambda k: jax.random.permutation(k, F))(jax.random.split(units_key, experts))
  new = order < round(amount * F)
  new = jnp.expand_dims(new, 3 - hidden)
  return jnp.where(new, jnp.mean(source) + jnp.std(source) * drawn, copies)


def write_upcycled(source: str, config: Config, workdir: str, method: str, amount: float) -> None:
  """Reads a dense run, and writes the workdir of the MoE model, as its step 0."""
  name, number = workdir_lib.split_step(source)
  path = workdir_lib.open_path(name)
  before = workdir_lib.read_config(path)
  startup.start()
  config = validation.resolve_mesh(config, jax.device_count())
  parts = check_upcycling(before.model, config.model)
  target = workdir_lib.open_new(workdir)
  setup = setup_lib.make(config, sharding.make_mesh(config.mesh))
  shapes = transformer.abstract_weights(before.model)
  step, stored = weights_lib.read(path, number or 0, shapes, setup.mesh)
  with progress.waiting(f"upcycling {path}"), jax.set_mesh(setup.mesh):
    key = jax.random.key(config.train.seed)
    make = jax.jit(
      lambda params: upcycle(params, before.model, config.model, method, amount, key),
      out_shardings=setup.shardings.params,
    )
    weights = Weights(make(stored.params), jnp.zeros(setup.shapes.bias_ZE.shape))
    workdir_lib.make(target)
    weights_lib.save(target, weights)
  fingerprint = tokenizers.load_tokenizer(config.data).fingerprint
  workdir_lib.write_object(target / workdir_lib.DATA, {"tokenizer": fingerprint})
  workdir_lib.inherit(target, path, fingerprint)
  workdir_lib.write_config(target, config)
  each = "a copy" if parts == 1 else f"one of {parts} parts"
  moe, same = config.model.moe, "something else"
  if is_exact(config.model, method):
    same = "what that run does, to rounding"
    if dispatch.has_capacity(moe):
      same += (
        f", but for the tokens that are dropped, which the dense run has not: over "
        f"capacity_factor={moe.capacity_factor} in training and "
        f"{moe.eval_capacity_factor} in evaluation"
      )
  print(
    f"{target} holds {config.model.moe.num_experts} experts, each of them {each} of the "
    f"feed-forward of {path}, step {step}. It computes {same}. Go on with train.py "
    f"--config={target} --init_from={target}"
  )


def main() -> None:
  """Reads the command line."""
  parser = command_line.Parser(__doc__, fields=True)
  parser.add_argument("--from", dest="source", required=True, help="a dense run: WORKDIR[:STEP]")
  parser.add_argument("--config", required=True, help="the config file of the MoE model")
  parser.add_argument("--workdir", required=True, help="new folder for the weights")
  parser.add_argument("--method", default="copy", choices=list(METHODS))
  parser.add_argument("--amount", type=float, help="noise (0.1), or new units (0.5)")
  args = parser.read()
  config = override(command_line.load_file(args.config), args.overrides, args.config)
  validation.validate(config)
  amount = METHODS[args.method] if args.amount is None else args.amount
  if not 0 <= amount <= 1:
    raise UserError(f"--amount={amount} must be from 0 to 1")
  write_upcycled(args.source, config, args.workdir, args.method, amount)


if __name__ == "__main__":
  command_line.one_line_errors(main)
