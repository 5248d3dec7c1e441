"""The whole configuration of a run: typed, saved as JSON beside its results. Imports no jax.

docs/config.md lists every field, from what stands here: `python -m moe_jax.config.docs`.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.config.choices import (
  BalanceScope,
  Dtype,
  OnAlarm,
  OnNonfinite,
  OptimizerName,
  Schedule,
)
from moe_jax.config.fields import LARGEST_SEED, Section, flatten, from_plain, option, plain, walk
from moe_jax.config.model import Model
from moe_jax.errors import UserError

SEEDS = ("train.seed", "data.seed")  # all that differs between the runs of an arm
_FORMAT = 5  # of config.json; `upgraded` says what older ones had
_SAME_MODEL = (
  "remat",
  "loss_chunk",
  "gradient_sums",
  "attention",
  "compute_dtype",
  "moe.grouped_matmul",
  "moe.jitter",
  "moe.bias_update_rate",
)
# Fields that are gone, and what to use in their place.
_REMOVED = {
  "data.cache_dir": "the flag --cache_dir=FOLDER or $MOE_JAX_CACHE names the cache",
  "data.text_field": "it is config.data.column",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Data(Section):
  """The text, how it is cut into rows, and who reads it."""

  name: str = option(
    "python_stdlib", "python_stdlib, python_domains, text (your own files), or a TFDS name."
  )
  path: str = option("", "For name=text: a file, a folder whose every file is read, or a pattern.")
  mixture: str = option(
    "",
    "Several texts in place of name, by share of the rows: LABEL=WEIGHT:TEXT, ..., where TEXT is a "
    "name or text:PATH, and may end in #COLUMN.",
  )
  column: str = option("text", "The text in a row of a table, a JSON line or a TFDS example.")
  train_split: str = option("train", "Text to train on, in TFDS's syntax: train[:1%] works.")
  validation_split: str = option("validation", "Text of the evaluations while training.")
  test_split: str = option("test", "Text of eval.py --split=test.")
  tokenizer: str = option("bytes", "bytes, or the path of a tokenizer.json or SentencePiece model.")
  seq_len: int = option(256, "Tokens of a row (L).", at_least=1)
  batch_size: int = option(32, "Rows of an optimizer step (B), over all devices.", at_least=1)
  seed: int = option(0, "Sets the order of the training rows.", at_least=0, at_most=LARGEST_SEED)
  threads: int = option(4, "Threads of each process that read rows.", at_least=1, at_most=256)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loss(Section):
  """Weights of the terms beside the cross entropy (docs/routing.md); 0 leaves a term out."""

  load_balance: float = option(0.01, "Balance of the load (Switch eq. 4).", at_least=0)
  balance_scope: BalanceScope = option(
    BalanceScope.GLOBAL, "The tokens whose balance load_balance asks for."
  )
  importance: float = option(0.0, "Balance of the summed gates (1701.06538 eq. 6-7).", at_least=0)
  load: float = option(
    0.0, "Balance of the chances to be chosen (1701.06538 eq. 10-11); noisy_topk only.", at_least=0
  )
  router_z: float = option(1e-3, "Size of the router's logits (ST-MoE eq. 5).", at_least=0)
  z: float = option(0.0, "Size of the output logits (PaLM: 1e-4).", at_least=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer(Section):
  """The update of the weights, and its learning rate over the run."""

  name: OptimizerName = option(OptimizerName.ADAMW, "The update rule.")
  learning_rate: float = option(3e-3, "The peak, at the end of the warm-up.", above=0)
  schedule: Schedule = option(Schedule.COSINE, "The learning rate after the warm-up.")
  warmup_steps: int = option(100, "Steps of a linear rise from 0.", at_least=0)
  decay_fraction: float = option(
    0.2, "Share of the steps in which wsd falls.", at_least=0, at_most=1
  )
  final_fraction: float = option(
    0.1, "Share of the peak at which cosine and wsd end.", at_least=0, at_most=1
  )
  b1: float = option(0.9, "Decay of Adam's first moment per step.", at_least=0, below=1)
  b2: float = option(0.95, "Decay of Adam's second moment per step.", at_least=0, below=1)
  eps: float = option(1e-8, "Added to the root of Adam's second moment.", above=0)
  weight_decay: float = option(
    0.1, "Multiplied by the learning rate; not for norms, embeddings and routers.", at_least=0
  )
  moment_dtype: Dtype = option(
    Dtype.FLOAT32, "Type of the first moments of adamw and of muon's momentum."
  )
  clip_norm: float = option(1.0, "Largest norm of the whole gradient; 0 is no limit.", at_least=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Train(Section):
  """How long a run is, and how often it says and saves something."""

  steps: int = option(1000, "Optimizer steps of the run.", at_least=1)
  seed: int = option(
    0, "Draws the initial weights and the routers' noise.", at_least=0, at_most=LARGEST_SEED
  )
  accumulation: int = option(
    1, "Microbatches of an optimizer step; losses equal the full batch's.", at_least=1
  )
  log_every: int = option(10, "Steps from one line of metrics to the next.", at_least=1)
  eval_every: int = option(250, "Steps from one evaluation to the next.", at_least=1)
  checkpoint_every: int = option(250, "Steps between checkpoints, each evaluated.", at_least=1)
  step_timeout: int = option(
    1800,
    "Seconds without the end of a step, compilation, saves and evaluations left out, after which "
    "the run ends with code 7; 0 waits for ever.",
    at_least=0,
  )
  keep_latest: int = option(2, "Newest checkpoints that are kept.", at_least=1)
  keep_best: int = option(1, "Checkpoints of the lowest validation loss, kept too.", at_least=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Health(Section):
  """When training raises an alarm. A limit of 0 never does. Layers are looked at one by one."""

  window: int = option(
    50, "Steps of the running means, of the loads and of the loss before a spike.", at_least=1
  )
  token_share: float = option(
    0.9, "Share of a layer's tokens that one expert takes: a collapse.", at_least=0, at_most=1
  )
  dead_fraction: float = option(
    0.5, "Share of a layer's experts under 5% of their fair share.", at_least=0, at_most=1
  )
  drop_fraction: float = option(
    0.5, "Share of a layer's assignments that are dropped.", at_least=0, at_most=1
  )
  patience: int = option(
    20, "Steps in a row over one of these three before it is an alarm.", at_least=1
  )
  loss_spike: float = option(1.0, "Nats of a step's loss above the window's mean.", at_least=0)
  on_alarm: OnAlarm = option(OnAlarm.WARN, "What any of the alarms above does.")
  on_nonfinite: OnNonfinite = option(
    OnNonfinite.STOP, "What a loss, a gradient or a router's logits that are not finite do."
  )
  skip_limit: int = option(5, "Skipped updates in a row that end the run.", at_least=1)
  rewind_limit: int = option(3, "Rewinds of a run before it ends.", at_least=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Eval(Section):
  """How much of the held-out text is evaluated at a time."""

  batch_size: int = option(0, "Rows of a batch; 0 is the training microbatch.", at_least=0)
  batches: int = option(16, "Batches of an evaluation in training; 0 is the split.", at_least=0)
  final_batches: int = option(0, "The same for eval.py, of any split.", at_least=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mesh(Section):
  """Devices along each axis; their product is all devices (docs/guide.md)."""

  data: int = option(-1, "Copies of the weights; -1 is all devices that are left.", at_least=-1)
  fsdp: int = option(1, "Parts of the model's width, for weights.", at_least=1)
  expert: int = option(1, "Parts of the experts.", at_least=1)
  context: int = option(1, "Parts of each sequence (docs/scale.md).", at_least=1)
  tensor: int = option(1, "Parts of heads, vocabulary and hidden widths.", at_least=1)

  @property
  def sequences(self) -> int:
    """How many parts a batch of whole sequences is split into; an open axis counts as 1."""
    return max(self.data, 1) * self.fsdp * self.expert

  @property
  def devices(self) -> int:
    """The product of all axes."""
    return self.sequences * self.context * self.tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config(Section):
  model: Model = dataclasses.field(default_factory=Model)
  data: Data = dataclasses.field(default_factory=Data)
  loss: Loss = dataclasses.field(default_factory=Loss)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  train: Train = dataclasses.field(default_factory=Train)
  health: Health = dataclasses.field(default_factory=Health)
  eval: Eval = dataclasses.field(default_factory=Eval)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)


def override(config: Config, fields: Mapping[str, Any], where: str = "override") -> Config:
  """Returns another config with {"model.moe.top_k": 1, "mesh": Mesh(expert=2), ...}; not validated.

  Args:
    config: is left as it is.
    fields: values by name: a section, a word as config.json has it, or a member of its enum.
    where: begins the UserError about a field that there is not.
  """
  known = {name: field for name, field, _ in walk(config)}
  for name, value in fields.items():
    if isinstance(value, Section):
      leaves = {f"{name}.{leaf}": leaf_value for leaf, _, leaf_value in walk(value)}
      config = override(config, leaves, where)
    elif name in known:
      config = _replace(config, name, from_plain(known[name], name, value))
    else:
      raise UserError(unknown_field(name, where))
  return config


def _replace(section: Any, name: str, value: Any) -> Any:
  first, _, rest = name.partition(".")
  new = _replace(getattr(section, first), rest, value) if rest else value
  return dataclasses.replace(section, **{first: new})


def changes(base: Config, config: Config) -> dict[str, Any]:
  """{field: value} of `config`, where it differs; values as config.json has them."""
  before = flatten(base)
  return {name: value for name, value in flatten(config).items() if value != before[name]}


def other_model(before: Model, model: Model, word: str) -> dict[str, str]:
  """{"model.moe.top_k": "config.model.moe.top_k=1 (WORD: 2)"}: what makes another function.

  Kernels and types compute the same one, and what is done in training alone is no part of it.
  """
  old = flatten(before)
  dense = not (before.moe.num_experts or model.moe.num_experts)
  return {
    f"model.{name}": f"config.model.{name}={value} ({word}: {old[name]})"
    for name, value in flatten(model).items()
    if value != old[name] and name not in _SAME_MODEL and not (dense and name.startswith("moe."))
  }


def to_json(config: Config) -> str:
  values = dataclasses.asdict(config, dict_factory=lambda kv: {k: plain(v) for k, v in kv})
  return json.dumps({"format": _FORMAT} | values, indent=2, allow_nan=False)


def from_json(text: str) -> Config:
  """Inverse of `to_json`. An unknown field is an error; a missing one takes its default."""
  return override(Config(), upgraded(json.loads(text)), "config.json")


def upgraded(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns {field: value} of a config.json of any format, with values as `to_json` writes them."""
  values = dict(_leaves(stored))
  number = values.pop("format", 0)
  values.pop("digest", None)  # which files.read_json has looked at
  if number > _FORMAT:
    raise UserError(f"config.json is of format {number}, made by a newer moe_jax; update this one")
  sections = {field.rpartition(".")[0] for field in field_names()}
  if wrong := sections & values.keys():
    raise UserError(f"config.json: {min(wrong)} is no object with its fields")
  for name in ("model.moe.capacity_factor", "model.moe.eval_capacity_factor"):
    if number < 1 and values.get(name) == 0:  # format 0, which has no number, wrote no limit as 0
      values[name] = "inf"
  if number < 2:  # the cache holds programs that are run, so only the user may name it
    values.pop("data.cache_dir", None)
  if number < 3 and isinstance(norm := values.get("model.qk_norm"), bool):
    values["model.qk_norm"] = "head" if norm else "none"
  has_latents = any(name.startswith("model.latent.") for name in values)
  if number < 4 and has_latents and "model.norm_eps" in values:  # one field was for all norms
    values.setdefault("model.latent.norm_eps", values["model.norm_eps"])
  if number < 5 and "data.text_field" in values:
    values["data.column"] = values.pop("data.text_field")
  return values


def _leaves(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """{"model": {"dim": 8}} -> ("model.dim", 8)."""
  for name, value in nested.items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def field_names() -> list[str]:
  return list(flatten(Config()))


def unknown_field(name: str, where: str) -> str:
  if name in _REMOVED:
    return f"{where}: there is no field config.{name}; {_REMOVED[name]}"
  names = field_names()
  leaves = {full.rsplit(".", 1)[-1]: full for full in reversed(names)}
  close = difflib.get_close_matches(name, names, 1, 0.75) or [
    leaves[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, 1, 0.5)
  ]
  near = f"; the nearest is config.{close[0]}" if close else ""
  return f"{where}: there is no field config.{name}{near}"
