"""The whole configuration of a run: typed, saved as JSON beside its results. Imports no jax."""

import dataclasses
import difflib
import enum
import json
from typing import Any

SEEDS = ("train.seed", "data.seed")  # all that differs between the runs of an arm


class UserError(ValueError):
  """A mistake that one line explains: the field, its value, and the remedy."""


class Router(enum.Enum):
  """docs/routing.md compares them; routers.py has one function for each."""

  SWITCH = "switch"
  TOPK = "topk"
  NOISY_TOPK = "noisy_topk"
  EXPERT_CHOICE = "expert_choice"
  SINKHORN = "sinkhorn"
  HASH = "hash"
  RANDOM = "random"


class Score(enum.Enum):
  SOFTMAX = "softmax"
  SIGMOID = "sigmoid"  # each expert scored alone (DeepSeek-V3)


class Priority(enum.Enum):
  """Whose assignments find a slot first when an expert is full."""

  TOKEN = "token"  # by position: causal
  CHOICE = "choice"  # all first choices, then all second ones (GShard); not causal
  SCORE = "score"  # by choice, then the most confident tokens (V-MoE); not causal


class Dispatch(enum.Enum):
  GATHER = "gather"  # index gather into fixed slots per expert; drops above capacity
  EINSUM = "einsum"  # one-hot matmuls (GShard); same result as gather
  GROUPED = "grouped"  # sorted by expert, grouped matmul; never drops
  DENSE = "dense"  # every expert on every token: the oracle; never drops


class Exchange(enum.Enum):
  """How the grouped dispatch moves tokens over the `expert` axis."""

  AUTO = "auto"  # ragged on TPU, all_gather elsewhere
  ALL_TO_ALL = "all_to_all"  # fixed buffers of exchange_factor; what overflows is counted
  ALL_GATHER = "all_gather"  # every device sees every token; reduce-scatter back
  RAGGED = "ragged"  # ragged_all_to_all: moves only what is routed; not on CPU


class GroupedMatmul(enum.Enum):
  """The kernel of the grouped dispatch's experts; kernels/experts.py has a record for each."""

  AUTO = "auto"  # the fastest that gives the reference's answer here, chosen when a run starts
  RAGGED_DOT = "ragged_dot"  # XLA's, the reference
  BLOCKED = "blocked"  # a loop of plain matmuls: for CPUs
  MOSAIC = "mosaic"  # tokamax, GPU and TPU
  MOSAIC_TPU_V2 = "mosaic_tpu_v2"  # tokamax, TPU
  TRITON = "triton"  # tokamax, GPU


class Attention(enum.Enum):
  """The kernel of attention over segments; kernels/attention.py has a record for each."""

  AUTO = "auto"  # the platform's, chosen when a run starts
  REFERENCE = "reference"  # a few lines, for every platform and size
  BLOCKS = "blocks"  # blocks of queries: for CPUs
  CUDNN = "cudnn"  # cuDNN's flash attention: NVIDIA
  SPLASH = "splash"  # Pallas splash attention: TPU


class BalanceScope(enum.Enum):
  """The tokens over which the balance loss takes its two means."""

  SEQUENCE = "sequence"  # each row alone (DeepSeek-V3)
  MICROBATCH = "microbatch"  # one accumulation step, all devices
  GLOBAL = "global"  # the whole batch (2501.11873)


class OnAlarm(enum.Enum):
  OFF = "off"
  WARN = "warn"  # a line on the terminal and in alarms.jsonl
  STOP = "stop"  # the same, and the run ends; its newest checkpoint stands


class Remat(enum.Enum):
  NONE = "none"  # keep every activation
  DOTS = "dots"  # keep matmul outputs, recompute the rest
  FULL = "full"  # keep one activation per layer, recompute the rest


class Dtype(enum.Enum):
  FLOAT32 = "float32"
  BFLOAT16 = "bfloat16"


class Schedule(enum.Enum):
  COSINE = "cosine"
  WSD = "wsd"  # warm-up, stable, linear decay over the last decay_fraction of the steps
  CONSTANT = "constant"


class OptimizerName(enum.Enum):
  """docs/guide.md compares them; optimizers.py has one record for each."""

  ADAMW = "adamw"
  ADAFACTOR = "adafactor"
  MUON = "muon"


@dataclasses.dataclass(slots=True, kw_only=True)
class MoE:
  num_experts: int = 0  # E; 0 is a dense model
  top_k: int = 2  # K, experts per token
  expert_dim: int = 256  # F of one expert
  shared_experts: int = 0  # more experts of the same size that every token uses
  router: Router = Router.TOPK
  score: Score = Score.SOFTMAX
  renormalize: bool = True  # the K gates of a token sum to 1 (Mixtral)
  gate_scale: float = 1.0  # times every gate (DeepSeek-V3: 2.5)
  expert_groups: int = 1  # experts are in groups, a token uses top_groups of them (DeepSeek-V3)
  top_groups: int = 1
  bias_update_rate: float = 0.0  # u of loss-free balancing (2408.15664: 1e-3); 0 is off
  priority: Priority = Priority.TOKEN
  dispatch: Dispatch = Dispatch.GATHER
  grouped_matmul: GroupedMatmul = GroupedMatmul.AUTO
  exchange: Exchange = Exchange.AUTO
  exchange_factor: float = 0.0  # rows per pair of devices / balanced share; 0 holds any load
  capacity_factor: float = 1.25  # slots per expert / (T*K/E) in training; 0 drops nothing
  eval_capacity_factor: float = 2.0  # the same in evaluation
  group_size: int = 0  # T, tokens that compete for the same slots; 0 is one sequence
  router_dtype: Dtype = Dtype.FLOAT32  # of logits and scores (Switch 2101.03961 section 2.4)
  jitter: float = 0.0  # router input times U(1-jitter, 1+jitter) in training
  every: int = 1  # after first_dense, each every-th layer is an MoE layer
  first_dense: int = 0  # leading dense layers


@dataclasses.dataclass(slots=True, kw_only=True)
class Model:
  vocab_size: int = 264  # V; bytes need 257, the rest pads to a multiple of 8
  num_layers: int = 4
  dim: int = 192  # D
  num_heads: int = 6  # H
  num_kv_heads: int = 2  # G
  head_dim: int = 32  # A
  ffn_dim: int = 512  # F of dense blocks
  rope_base: float = 10_000.0
  norm_eps: float = 1e-5
  qk_norm: bool = False
  tied_head: bool = True
  compute_dtype: Dtype = Dtype.FLOAT32  # parameters stay float32
  remat: Remat = Remat.NONE
  attention: Attention = Attention.AUTO
  moe: MoE = dataclasses.field(default_factory=MoE)

  @property
  def residual_scale(self) -> float:
    """Of the initial weights that write to the residual stream: its variance stays near 1."""
    return (2 * self.num_layers) ** -0.5


@dataclasses.dataclass(slots=True, kw_only=True)
class Data:
  name: str = "python_stdlib"  # or "python_domains", "text" for your own files, a TFDS name
  path: str = ""  # a .txt/.jsonl file or a folder of them, for name="text"
  text_field: str = "text"  # key of the text in each example or JSON line
  train_split: str = "train"  # TFDS split syntax, so "train[:1%]" works
  validation_split: str = "validation"
  test_split: str = "test"
  tokenizer: str = "bytes"  # "bytes", or a path: tokenizer.json or SentencePiece .model
  seq_len: int = 256  # L
  batch_size: int = 32  # sequences per optimizer step, over all devices
  seed: int = 0  # order of the training rows
  threads: int = 4  # reader threads per process
  cache_dir: str = ""  # "" is $MOE_JAX_CACHE, or moe_jax in the user's cache directory


@dataclasses.dataclass(slots=True, kw_only=True)
class Loss:
  load_balance: float = 0.01  # Switch eq. 4, normalised: 1.0 is perfect balance
  balance_scope: BalanceScope = BalanceScope.GLOBAL
  importance: float = 0.0  # Shazeer 2017 eq. 6-7, normalised likewise: CV^2 + 1
  load: float = 0.0  # Shazeer 2017 eq. 10-11, likewise; noisy_topk only
  router_z: float = 1e-3  # ST-MoE eq. 5
  z: float = 0.0  # the same on the output logits (PaLM uses 1e-4)


@dataclasses.dataclass(slots=True, kw_only=True)
class Optimizer:
  name: OptimizerName = OptimizerName.ADAMW
  learning_rate: float = 3e-3  # peak
  schedule: Schedule = Schedule.COSINE
  warmup_steps: int = 100
  decay_fraction: float = 0.2  # of the steps, for wsd
  final_fraction: float = 0.1  # of the peak, where cosine and wsd end
  b1: float = 0.9  # of Adam's moments, as b2 and eps are
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1  # matrices only: not norms, embeddings or routers
  clip_norm: float = 1.0  # global gradient norm; 0 is off


@dataclasses.dataclass(slots=True, kw_only=True)
class Train:
  steps: int = 1000
  seed: int = 0  # initial weights and router noise
  accumulation: int = 1  # microbatches per optimizer step; the losses equal the full batch's
  log_every: int = 10
  eval_every: int = 250
  checkpoint_every: int = 250  # each with an evaluation
  keep_latest: int = 1
  keep_best: int = 1  # by validation loss


@dataclasses.dataclass(slots=True, kw_only=True)
class Health:
  """When training raises an alarm. A limit of 0 never does."""

  window: int = 50  # steps: of the running mean of loads, and of the mean loss before a spike
  token_share: float = 0.9  # collapse: one expert takes this part of a layer's tokens
  dead_fraction: float = 0.5  # of a layer's experts, by the running mean, below 5% of a fair share
  drop_fraction: float = 0.5  # of a layer's assignments
  patience: int = 20  # steps in a row before one of these three is an alarm
  loss_spike: float = 1.0  # nats above the mean of the last `window` steps
  on_alarm: OnAlarm = OnAlarm.WARN
  on_nonfinite: OnAlarm = OnAlarm.STOP  # the loss, a gradient, or a router's logits


@dataclasses.dataclass(slots=True, kw_only=True)
class Eval:
  batch_size: int = 0  # sequences; 0 is the training microbatch
  batches: int = 16  # while training: rows spread evenly over the validation set; 0 is all of it
  final_batches: int = 0  # the same for eval.py, of any split


@dataclasses.dataclass(slots=True, kw_only=True)
class Mesh:
  data: int = -1  # -1 is all devices that the other axes leave
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
  model: Model = dataclasses.field(default_factory=Model)
  data: Data = dataclasses.field(default_factory=Data)
  loss: Loss = dataclasses.field(default_factory=Loss)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  train: Train = dataclasses.field(default_factory=Train)
  health: Health = dataclasses.field(default_factory=Health)
  eval: Eval = dataclasses.field(default_factory=Eval)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
  """{"model.moe.top_k": 2, ...}, with enums as their values."""
  flat: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    name = prefix + field.name
    if dataclasses.is_dataclass(value):
      flat |= flatten(value, name + ".")
    else:
      flat[name] = value.value if isinstance(value, enum.Enum) else value
  return flat


def to_json(config: Config) -> str:
  def plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value

  return json.dumps(
    dataclasses.asdict(config, dict_factory=lambda kv: {k: plain(v) for k, v in kv}), indent=2
  )


def from_json(text: str) -> Config:
  """Inverse of `to_json`. An unknown field is an error; a missing one takes its default."""

  def build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for name, value in values.items():
      if name not in fields:
        raise UserError(unknown_field(prefix + name, "config.json"))
      kind = fields[name].type
      if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        built[name] = build(kind, value, f"{prefix}{name}.")
      else:
        built[name] = _to_enum(kind, prefix + name, value)
    return cls(**built)

  return build(Config, json.loads(text), "")


def _to_enum(kind: Any, name: str, value: Any) -> Any:
  """The member of that value where `kind` is an enum; any other value as it is."""
  if not isinstance(kind, type) or not issubclass(kind, enum.Enum):
    return value
  try:
    return kind(value)
  except ValueError:
    choices = ", ".join(member.value for member in kind)
    raise UserError(f"config.{name}={value!r} is not one of: {choices}") from None


def field_names() -> list[str]:
  return list(flatten(Config()))


def unknown_field(name: str, where: str) -> str:
  names = field_names()
  leaf = name.rsplit(".", 1)[-1]
  close = difflib.get_close_matches(name, names, 1, 0.75) or [
    full
    for near in difflib.get_close_matches(leaf, [n.rsplit(".", 1)[-1] for n in names], 1, 0.5)
    for full in names
    if full.rsplit(".", 1)[-1] == near
  ]
  near = f"; the nearest is config.{close[0]}" if close else ""
  return f"{where}: there is no field config.{name}{near}"
