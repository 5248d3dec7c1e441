"""What a config.json of Hugging Face means in our config, and back, by one table for each family.

Nothing is guessed: a field of theirs that our model cannot express refuses the import, and a field
of ours that theirs cannot say refuses the export, both by name.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.config import Activation, Config, Model, RopeScaling, override
from moe_jax.config.fields import flatten, plain, walk
from moe_jax.errors import UserError
from moe_jax.hf.layout import Row
from moe_jax.model.pattern import moe_layers


def _same(value: Any) -> Any:
  return value


class Field(NamedTuple):
  """One line of a family's table of fields."""

  ours: str  # of config.Model: "moe.top_k"
  theirs: str
  # Where theirs is null, or missing without a default of the family; a function takes all theirs.
  default: Any = None
  to_ours: Callable[[Any], Any] = _same
  to_theirs: Callable[[Any], Any] = _same
  also: str = ""  # another name of theirs, which newer versions of transformers write


class Family(NamedTuple):
  """All that is particular to one family of models."""

  model_type: str
  architecture: str  # the class in transformers
  fields: tuple[Field, ...]
  layer: tuple[Row, ...]  # the tensors of a layer
  # What other files have in place of some of them; they are read and not written.
  stacked: tuple[Row, ...] = ()
  # {field of theirs: what their code takes where a config.json lacks it}
  defaults: dict[str, Any] = {}  # noqa: RUF012
  fixed: dict[str, Any] = {}  # noqa: RUF012 {field of ours: the value that the family has}
  allowed: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012 {field of theirs: values that we can express}
  rope_base: float = 10_000.0  # where rope_theta is missing
  rope: dict[str, Any] = {}  # noqa: RUF012 rope_parameters, where there are none
  partial_rotary: float | None = None  # the default of partial_rotary_factor, where it is read
  # {field of ours: its value, made of several fields of their config.json}, and the way back
  read: dict[str, Callable[[Mapping[str, Any]], Any]] = {}  # noqa: RUF012
  written: Callable[[Model], dict[str, Any]] = lambda model: {}
  scores_mscale: bool = False  # whether YaRN's mscale_all_dim counts in the scores
  check: Callable[[Model], str] = lambda model: ""  # why a model is not of the family; "" if it is
  left_out: str = ""  # a regular expression of tensors that the family has and we do not read
  why_left_out: str = ""


# Fields that change no value of a model without dropped tokens, or only how it is trained.
_FREE = (
  "compute_dtype", "remat", "attention", "moe.dispatch", "moe.grouped_matmul", "moe.exchange",
  "moe.exchange_factor", "moe.exchange_fallback", "moe.exchange_chunks", "moe.capacity_factor",
  "moe.eval_capacity_factor", "moe.group_size", "moe.priority", "moe.router_dtype", "moe.jitter",
  "moe.bias_update_rate",
)  # fmt: skip
# Fields of theirs that say nothing about the function from tokens to logits.
_UNREAD = (
  "architectures", "attention_dropout", "auto_map", "bos_token_id", "dtype", "eos_token_id",
  "id2label", "initializer_range", "label2id", "max_position_embeddings", "max_window_layers",
  "output_router_logits", "pad_token_id", "pretraining_tp", "router_aux_loss_coef",
  "router_jitter_noise", "torch_dtype", "transformers_version", "use_cache", "sliding_window",
  "layer_types", "num_nextn_predict_layers", "num_mtp_layers", "model_type", "rope_scaling",
  "rope_theta", "rope_parameters", "partial_rotary_factor", "rotary_dim", "_name_or_path",
  "rope_interleave", "output_attentions", "output_hidden_states", "return_dict",
  "is_encoder_decoder", "chunk_size_feed_forward", "problem_type", "tokenizer_class", "head_dim",
  "experts_implementation", "quantization_config", "qk_head_dim", "ep_size", "aux_loss_alpha",
  "seq_aux", "mlp_only_layers",
)  # fmt: skip


def text_config(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the config of the text model in that of a model of text and images."""
  text = theirs.get("text_config")
  if not isinstance(text, dict):
    return theirs
  return {"tie_word_embeddings": theirs.get("tie_word_embeddings", False)} | text


def to_model(family: Family, theirs: Mapping[str, Any], where: str) -> tuple[Model, list[str]]:
  """Returns our model of their config.json, and the fields of theirs that nothing reads.

  Raises:
    UserError: names a field that is missing, or that our model cannot express.
  """
  theirs = family.defaults | dict(theirs)
  try:
    model = _model(_values(family, theirs, where), where)
  except UserError:
    raise
  except KeyError as error:
    raise UserError(f"{where}: {error.args[0]} is missing") from None
  except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
    raise UserError(f"{where}: a field has a value of another kind: {error}") from None
  if why := family.check(model):
    raise UserError(f"{where}: {why}")
  known = {name for f in family.fields for name in (f.theirs, f.also)}
  return model, sorted(set(theirs) - known - set(family.allowed) - set(_UNREAD))


def _values(family: Family, theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns our values by field; raises whatever a value of a wrong type leads to."""
  values: dict[str, Any] = dict(family.fixed)
  for field in family.fields:
    value = theirs.get(field.theirs, theirs.get(field.also))
    if value is None:
      value = field.default(theirs) if callable(field.default) else field.default
    if value is None:
      raise UserError(f"{where}: {field.theirs} is missing, which a {family.model_type} needs")
    values[field.ours] = field.to_ours(value)
  values |= {ours: read(theirs) for ours, read in family.read.items()}
  for name, able in family.allowed.items():
    if theirs.get(name) not in (*able, None):
      words = ", ".join(map(repr, able)) or "null"
      raise UserError(
        f"{where}: {name}={theirs[name]!r} cannot be expressed here; known is {words}"
      )
  return values | _rope_to_ours(family, theirs, values, where)


def _model(values: Mapping[str, Any], where: str) -> Model:
  """Returns the Model with these values by field, of the types that the fields have."""
  model = override(Config(), {f"model.{name}": value for name, value in values.items()}).model
  for name, field, value in walk(model):
    if type(value) is not field.type:
      raise UserError(f"{where}: {value!r} is no value of config.model.{name}")
  return model


def to_theirs(family: Family, model: Model) -> dict[str, Any]:
  """Returns the fields of a config.json of this family, for our model.

  Raises:
    UserError: names each field of ours that the family cannot express.
  """
  values, wrong = flatten(model), []
  theirs: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
  for field in family.fields:
    value = field.to_theirs(values[field.ours])
    if field.theirs in theirs and theirs[field.theirs] != value:
      wrong.append(f"{field.ours}={values[field.ours]} beside another of the same {field.theirs}")
    theirs[field.theirs] = value
  named = {field.ours for field in family.fields} | set(family.read)
  default = flatten(Model())
  for name in sorted(relevant(model) - named - set(_ROPE)):
    value = plain(family.fixed.get(name, default[name]))
    if values[name] != value:
      wrong.append(f"{name}={values[name]} (it has {value})")
  if model.rotary_fraction != 1 and family.partial_rotary is None:
    wrong.append(f"rotary_fraction={model.rotary_fraction} (it has 1)")
  if "moe.num_experts" in named and not model.moe.num_experts:
    wrong.append("moe.num_experts=0: it has experts")
  if why := family.check(model):
    wrong.append(why)
  if wrong:
    raise UserError(
      f"config.model cannot be said as {family.model_type}: {'; '.join(wrong)}; choose another "
      "--family, or a model that one has"
    )
  theirs |= {name: able[0] if able else None for name, able in family.allowed.items()}
  return theirs | family.written(model) | _rope_to_theirs(family, model)


def relevant(model: Model) -> set[str]:
  """Returns the fields of a model that change what it computes."""
  names = set(flatten(model)) - set(_FREE)
  with_experts = len(moe_layers(model))
  if not with_experts:
    names = {name for name in names if not name.startswith("moe.") or name == "moe.num_experts"}
  if with_experts == model.num_layers:
    names -= {"ffn_dim"}
  if not model.moe.shared_experts:
    names -= {"moe.shared_dim", "moe.shared_gate"}
  if not model.window and not model.delta.value_heads:
    names -= {"global_every"}
  if not model.delta.value_heads:
    names -= {name for name in names if name.startswith("delta.")} - {"delta.value_heads"}
  if model.activation is not Activation.CLAMPED_SWIGLU:
    names -= {"activation_limit"}
  if not model.latent.kv_dim:
    names -= {f"latent.{name}" for name in ("query_dim", "rotary_dim", "value_dim", "norm_eps")}
  if model.moe.expert_groups == 1:
    names -= {"moe.top_groups", "moe.group_score"}
  return names


_ROPE = (
  "rope_base",
  "rotary_fraction",
  *(f"rope_scaling.{name}" for name in flatten(RopeScaling())),
)


def _rope_to_ours(
  family: Family, theirs: Mapping[str, Any], values_of: Mapping[str, Any], where: str
) -> dict[str, Any]:
  """Reads rope_parameters, or rope_theta and rope_scaling of older files."""
  rope = dict(theirs.get("rope_scaling") or {}) | dict(theirs.get("rope_parameters") or {})
  rope = rope or family.rope
  base = rope.get("rope_theta", theirs.get("rope_theta"))
  values: dict[str, Any] = {"rope_base": family.rope_base if base is None else float(base)}
  fraction = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor"))
  if fraction is None and theirs.get("rotary_dim"):  # the name in MiniMax's files
    fraction = theirs["rotary_dim"] / values_of["head_dim"]
  if family.partial_rotary is not None:
    values["rotary_fraction"] = float(family.partial_rotary if fraction is None else fraction)
  elif fraction not in (None, 1, 1.0):
    raise UserError(f"{where}: partial_rotary_factor={fraction} is not read by {family.model_type}")
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return values
  if kind not in ("linear", "yarn", "llama3"):
    raise UserError(
      f"{where}: rope_type={kind!r} cannot be expressed; known are default, linear, yarn and llama3"
    )
  longest = theirs.get("max_position_embeddings")
  original = rope.get("original_max_position_embeddings") or longest
  factor = rope.get("factor") or (longest / original if longest and original else None)
  if factor is None or (original is None and kind != "linear"):
    raise UserError(f"{where}: rope_type={kind!r} has no factor or no length")
  scaling: dict[str, Any] = {"kind": kind, "factor": float(factor)}
  if kind != "linear":
    scaling["original_length"] = original
  for name in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
    if rope.get(name):
      scaling[name] = float(rope[name])
  if kind == "yarn":
    scaling["truncate"] = bool(rope.get("truncate", True))
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
      attention = _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    if family.scores_mscale:
      scaling["mscale_all_dim"] = float(rope.get("mscale_all_dim") or 0.0)
    scaling["attention_factor"] = float(attention or 0.0)
  return values | {f"rope_scaling.{name}": value for name, value in scaling.items()}


def _mscale(factor: float, scale: float) -> float:
  return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def _mscale_of(scaling: RopeScaling) -> float:
  """Returns the mscale that with mscale_all_dim makes the attention_factor."""
  if scaling.factor <= 1:
    return 1.0
  whole = scaling.attention_factor or _mscale(scaling.factor, 1.0)
  whole *= _mscale(scaling.factor, scaling.mscale_all_dim)
  return (whole - 1) / (0.1 * math.log(scaling.factor))


def _rope_to_theirs(family: Family, model: Model) -> dict[str, Any]:
  """Returns rope_parameters for newer versions of transformers, and what older ones read."""
  scaling = model.rope_scaling
  fields: dict[str, Any] = {}
  kind = scaling.kind.value
  if kind != "none":
    fields = {"rope_type": kind, "factor": scaling.factor}
  if kind in ("yarn", "llama3"):
    fields["original_max_position_embeddings"] = scaling.original_length
  names = {
    "yarn": ("beta_fast", "beta_slow", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
  }
  fields |= {name: getattr(scaling, name) for name in names.get(kind, ())}
  if scaling.attention_factor and kind == "yarn":
    fields["attention_factor"] = scaling.attention_factor
  if (
    kind == "yarn" and family.scores_mscale and (scaling.attention_factor or scaling.mscale_all_dim)
  ):
    # DeepSeek's own code reads these two and no attention_factor.
    fields |= {"mscale": _mscale_of(scaling), "mscale_all_dim": scaling.mscale_all_dim}
  theirs: dict[str, Any] = {"rope_theta": model.rope_base, "rope_scaling": fields or None}
  new = {"rope_type": "default"} | fields | {"rope_theta": model.rope_base}
  if family.partial_rotary is not None:
    theirs["partial_rotary_factor"] = new["partial_rotary_factor"] = model.rotary_fraction
  return theirs | {"rope_parameters": new}
