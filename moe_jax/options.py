"""What a config is made of: a field's default, meaning and bounds in one place, and the choices.

docs/config.md and `train.py --help` are written from here and from config.py. Imports no jax.
"""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from moe_jax.errors import UserError

T = TypeVar("T")

LARGEST_INT = 2**31 - 1  # steps, tokens and sizes are int32 on a device
LARGEST_SEED = 2**32 - 1  # jax would take a larger one modulo 2**32
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # float32: beyond them a number is 0 or infinite on a device


class Bounds(NamedTuple):
  """The values that a number may have; an infinite bound is none."""

  at_least: float = -math.inf
  above: float = -math.inf
  at_most: float = math.inf
  below: float = math.inf
  infinite: bool = False  # inf is a value too: no limit

  def wrong(self, value: float) -> str:
    """What is wrong with a value, "must be at least 1"; "" if nothing is."""
    if value == math.inf and self.infinite:
      return ""
    if not -math.inf < value < math.inf:
      return "is not a finite number"
    if not (self.above < value < self.below and self.at_least <= value <= self.at_most):
      return f"must be {self}"
    if isinstance(value, int):
      too_large = value > LARGEST_INT and self.at_most == math.inf
      return f"is too large: an integer is at most {LARGEST_INT}" if too_large else ""
    in_range = not value or _SMALLEST <= abs(value) <= _LARGEST
    return "" if in_range else f"is out of float32's range, {_SMALLEST} to {_LARGEST}"

  def __str__(self) -> str:
    bounds = {
      "at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below
    }  # fmt: skip
    words = " and ".join(
      f"{word} {n if isinstance(n, int) else f'{n:g}'}"
      for word, n in bounds.items()
      if -math.inf < n < math.inf
    )
    return words + "; inf is no limit" * self.infinite


# What can be asked of a TextGenerator and of generate.py.
GENERATION = {
  "max_new_tokens": Bounds(at_least=1),
  "temperature": Bounds(at_least=0),
  "top_k": Bounds(at_least=0),
  "top_p": Bounds(above=0, at_most=1),
  "seed": Bounds(at_least=0, at_most=LARGEST_SEED),
  "num_samples": Bounds(at_least=1, at_most=100_000),
}


def check_generation(values: dict[str, Any]) -> None:
  """Raises a UserError unless each value, by the name of its option, is in its bounds."""
  for name, value in values.items():
    if wrong := GENERATION[name].wrong(value):
      raise UserError(f"{name}={value} {wrong}")


def option(
  default: T,
  help: str,
  *,
  at_least: float = -math.inf,
  above: float = -math.inf,
  at_most: float = math.inf,
  below: float = math.inf,
  infinite: bool = False,
) -> T:
  """A field of a section: its default, what it means, and what a number may be."""
  bounds = Bounds(at_least, above, at_most, below, infinite)
  return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


class Section:
  """Base of a config's sections. An int that is set where a float belongs becomes one."""

  __slots__ = ()

  def __setattr__(self, name: str, value: Any) -> None:
    if type(value) is int and type(self).__annotations__.get(name) is float:
      value = float(value)
    object.__setattr__(self, name, value)


def cached(function: Callable[..., T]) -> Callable[..., T]:
  """Caches a function of a section, and of more, by the section's text: sections can change."""
  results: dict[tuple[Any, ...], T] = {}

  @functools.wraps(function)
  def call(section: Section, *more: Any) -> T:
    key = (repr(section), *more)
    if key not in results:
      results[key] = function(section, *more)
    return results[key]

  return call


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
  """("model.moe.top_k", its dataclass field, its value) of each field of a config."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, Section):
      yield from walk(value, f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, field, value


def flatten(config: Any) -> dict[str, Any]:
  """{"model.moe.top_k": 2, ...}, with values as config.json has them."""
  return {name: plain(value) for name, _, value in walk(config)}


def plain(value: Any) -> Any:
  """A value of a field as JSON can have it."""
  if isinstance(value, enum.Enum):
    return value.value
  return "inf" if value == math.inf else value


def spelled(value: Any) -> str:
  """A value of a field as the command line takes it."""
  return str(value).lower() if isinstance(value, bool) else str(plain(value))


def from_plain(field: dataclasses.Field, name: str, value: Any) -> Any:
  """Inverse of what `flatten` does to the value of a field; UserError for an unknown word."""
  kind = field.type
  if kind is float and value == "inf":
    return math.inf
  if not isinstance(kind, type) or not issubclass(kind, enum.Enum):
    return value
  try:
    return kind(value)
  except ValueError:
    choices = ", ".join(member.value for member in kind)
    raise UserError(f"config.{name}={value!r} is not one of: {choices}") from None


class Choice(enum.Enum):
  """A word of the command line and its meaning, which may also stand in the class's docstring."""

  _value_: str
  meaning: str

  def __new__(cls, value: str, meaning: str = "") -> "Choice":
    member = object.__new__(cls)
    member._value_, member.meaning = value, meaning
    return member


class Router(Choice):
  """How tokens and experts find each other. docs/routing.md compares the routers."""

  SWITCH = "switch"
  TOPK = "topk"
  NOISY_TOPK = "noisy_topk"
  EXPERT_CHOICE = "expert_choice"
  SINKHORN = "sinkhorn"
  HASH = "hash"
  RANDOM = "random"


class QKNorm(Choice):
  """The RMSNorm of queries and keys before positions are added."""

  NONE = "none", "none"
  HEAD = "head", "of each head by itself, with one scale for all heads (Qwen3)"
  WIDTH = "width", "over all heads together, with a scale for each (OLMoE)"


class GroupScore(Choice):
  """What the groups of experts are compared by."""

  TWO_BEST = "two_best", "the sum of a group's two best scores (DeepSeek-V3)"
  BEST = "best", "a group's best score (DeepSeek-V2)"


class Activation(Choice):
  """The nonlinearity of a feed-forward and of an expert, between its matrices."""

  SWIGLU = "swiglu", "silu(gate) * up (2002.05202)"
  CLAMPED_SWIGLU = (
    "clamped_swiglu",
    "(up + 1) * gate * sigmoid(1.702 gate), both clamped by activation_limit (gpt-oss)",
  )
  GEGLU = "geglu", "gelu(gate) * up, with tanh (2002.05202)"
  RELU_SQUARED = "relu_squared", "max(up, 0)^2, without a gate matrix (2109.08668)"
  GELU = "gelu", "gelu(up), with tanh, without a gate matrix"


class RopeKind(Choice):
  """How the rotary embedding's wavelengths are stretched for text longer than `original_length`."""

  NONE = "none", "not at all"
  LINEAR = "linear", "all alike, by `factor` (2306.15595)"
  YARN = "yarn", "the long ones by `factor`, with a ramp from beta_fast to beta_slow (2309.00071)"
  LLAMA3 = "llama3", "the long ones by `factor`, with a ramp over wavelengths (2407.21783)"


class Score(Choice):
  """What a token's logits are made into."""

  SOFTMAX = "softmax", "probabilities: a token's scores sum to 1"
  SIGMOID = "sigmoid", "each expert is scored alone (DeepSeek-V3)"


class Priority(Choice):
  """Whose assignments find a slot first when an expert is full."""

  TOKEN = "token", "by position: causal"
  CHOICE = "choice", "all first choices, then all second ones (GShard); not causal"
  SCORE = "score", "by choice, then the most confident tokens (V-MoE); not causal"


class Dispatch(Choice):
  """How tokens are laid out in rows for the experts."""

  GATHER = "gather", "moved by index into a fixed number of slots per expert; what overflows drops"
  EINSUM = "einsum", "the same result by matmuls with one-hot matrices (GShard)"
  GROUPED = "grouped", "sorted by expert, for one grouped matmul; never drops"
  DENSE = "dense", "every expert computes every token: the oracle of the tests; never drops"


class Exchange(Choice):
  """How the grouped dispatch moves tokens over the `expert` axis of the mesh."""

  AUTO = "auto", "`ragged` on TPU, `all_gather` elsewhere"
  ALL_TO_ALL = "all_to_all", "fixed buffers of `exchange_factor`; what overflows is counted"
  ALL_GATHER = "all_gather", "every device sees every token; outputs return by a reduce-scatter"
  RAGGED = "ragged", "a ragged_all_to_all moves only what is routed; not on CPU"


class GroupedMatmul(Choice):
  """The kernel of the grouped dispatch's experts; kernels/experts.py has a record for each."""

  AUTO = "auto", "the fastest here that gives the reference's answer, chosen when a run starts"
  RAGGED_DOT = "ragged_dot", "XLA's own: the reference"
  BLOCKED = "blocked", "a loop of plain matmuls: for CPUs"
  MOSAIC = "mosaic", "tokamax, for GPU and TPU"
  MOSAIC_TPU_V2 = "mosaic_tpu_v2", "tokamax, for TPU"
  TRITON = "triton", "tokamax, for GPU"


class Attention(Choice):
  """The kernel of attention over segments; kernels/attention.py has a record for each."""

  AUTO = "auto", "the platform's, chosen when a run starts"
  REFERENCE = "reference", "a few lines, for every platform and size"
  BLOCKS = "blocks", "blocks of queries: for CPUs"
  CUDNN = "cudnn", "cuDNN's flash attention: for NVIDIA"
  SPLASH = "splash", "Pallas splash attention: for TPU"


class BalanceScope(Choice):
  """The tokens over which the balance loss takes its two means."""

  SEQUENCE = "sequence", "each row alone (DeepSeek-V3)"
  MICROBATCH = "microbatch", "one accumulation step, on all devices"
  GLOBAL = "global", "the whole batch (2501.11873)"


class OnAlarm(Choice):
  """What an alarm does."""

  OFF = "off", "nothing"
  WARN = "warn", "it writes a line on the terminal and in alarms.jsonl"
  STOP = "stop", "the same, and the run ends; its newest checkpoint stands"


class OnNonfinite(Choice):
  """What happens after a step whose loss, gradients or router logits are not finite."""

  OFF = "off", "nothing; but a state that is not finite is never saved"
  WARN = "warn", "the same, and a line on the terminal and in alarms.jsonl"
  STOP = "stop", "the run ends; its newest checkpoint stands"
  SKIP = "skip", "the step's update is dropped; `skip_limit` of them in a row end the run"
  REWIND = "rewind", "back to the newest checkpoint and on with later rows, `rewind_limit` times"


class Remat(Choice):
  """Which activations of the forward pass are kept for the backward pass."""

  NONE = "none", "all"
  DOTS = "dots", "the outputs of matmuls; the rest is computed again"
  FULL = "full", "one for each layer; the rest is computed again"


class Dtype(Choice):
  """A type of floating-point numbers."""

  FLOAT32 = "float32"
  BFLOAT16 = "bfloat16"


class Schedule(Choice):
  """The learning rate after the warm-up."""

  COSINE = "cosine", "falls along a cosine to final_fraction of the peak"
  WSD = "wsd", "stays, then falls linearly over the last decay_fraction of the steps"
  CONSTANT = "constant", "stays"


class OptimizerName(Choice):
  """The update rule. docs/guide.md compares the optimizers; optimizers.py has a record for each."""

  ADAMW = "adamw"
  ADAFACTOR = "adafactor"
  MUON = "muon"
