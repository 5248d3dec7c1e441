"""Rows and fields that the tables of several families share."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config import Model
from moe_jax.hf.fields import Family, Field
from moe_jax.hf.layout import Row
from moe_jax.model.pattern import layer_kinds

TOP = (
  Row("embed_VD", "model.embed_tokens.weight", "VD"),
  Row("final_norm.norm_D", "model.norm.weight", "D"),
  Row("head_DV", "lm_head.weight", "VD"),
)
LAYER = "model.layers.{layer}."  # the prefix of a layer's tensors
# Tensors of older checkpoints that are computed from the config.
COMPUTED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

ATTENTION = (
  Row("attention_norm.norm_D", "input_layernorm.weight", "D"),
  Row("attention.q_DHA", "self_attn.q_proj.weight", "(HA)D"),
  Row("attention.k_DGA", "self_attn.k_proj.weight", "(GA)D"),
  Row("attention.v_DGA", "self_attn.v_proj.weight", "(GA)D"),
  Row("attention.out_HAD", "self_attn.o_proj.weight", "D(HA)"),
  Row("attention.q_bias_HA", "self_attn.q_proj.bias", "(HA)"),
  Row("attention.k_bias_GA", "self_attn.k_proj.bias", "(GA)"),
  Row("attention.v_bias_GA", "self_attn.v_proj.bias", "(GA)"),
  Row("attention.out_bias_D", "self_attn.o_proj.bias", "D"),
  Row("attention.q_norm.norm_A", "self_attn.q_norm.weight", "A"),
  Row("attention.k_norm.norm_A", "self_attn.k_norm.weight", "A"),
  Row("attention.q_norm.norm_HA", "self_attn.q_norm.weight", "(HA)"),
  Row("attention.k_norm.norm_GA", "self_attn.k_norm.weight", "(GA)"),
  Row("ffn_norm.norm_D", "post_attention_layernorm.weight", "D"),
)


def dense(ours: str, theirs: str) -> tuple[Row, ...]:
  """Returns the rows of a feed-forward of three matrices."""
  return (
    Row(f"{ours}.gate_DF", f"{theirs}.gate_proj.weight", "FD"),
    Row(f"{ours}.up_DF", f"{theirs}.up_proj.weight", "FD"),
    Row(f"{ours}.down_FD", f"{theirs}.down_proj.weight", "DF"),
  )


def expert_rows(theirs: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
  """Returns the rows of experts whose matrices are each a tensor of their files."""
  return (
    Row("ffn.gate_EDF", f"{theirs}.experts.{{expert}}.{gate}.weight", "FD"),
    Row("ffn.up_EDF", f"{theirs}.experts.{{expert}}.{up}.weight", "FD"),
    Row("ffn.down_EFD", f"{theirs}.experts.{{expert}}.{down}.weight", "DF"),
  )


DENSE = (*ATTENTION, *dense("ffn", "mlp"))
_EXPERTS = (
  Row("ffn.router_DE", "mlp.gate.weight", "ED"),
  *expert_rows("mlp", "gate_proj", "up_proj", "down_proj"),
)
MLP_EXPERTS = (*DENSE, *_EXPERTS)  # also of layers without experts
QWEN_SHARED = (
  *dense("ffn", "mlp"),
  *_EXPERTS,
  *dense("ffn.shared", "mlp.shared_expert"),
  Row("ffn.shared_gate_D", "mlp.shared_expert_gate.weight", "1D"),
)


def head_dim(theirs: Mapping[str, Any]) -> int | None:
  """Returns what transformers takes where their config.json has no head_dim."""
  width, heads = theirs.get("hidden_size"), theirs.get("num_attention_heads")
  return width // heads if width and heads else None


COMMON = (
  Field("vocab_size", "vocab_size"),
  Field("num_layers", "num_hidden_layers"),
  Field("dim", "hidden_size"),
  Field("num_heads", "num_attention_heads"),
  Field("num_kv_heads", "num_key_value_heads", lambda theirs: theirs.get("num_attention_heads")),
  Field("head_dim", "head_dim", head_dim),
  Field("norm_eps", "rms_norm_eps", 1e-6),
  Field("tied_head", "tie_word_embeddings", False),
)
DENSE_WIDTH = Field("ffn_dim", "intermediate_size")
BIASES = (
  Field("qkv_bias", "attention_bias", False),
  Field("out_bias", "attention_bias", False),
)
LOCAL_EXPERTS = (
  Field("moe.num_experts", "num_local_experts"),
  Field("moe.top_k", "num_experts_per_tok"),
  Field("moe.expert_dim", "intermediate_size"),
)
QWEN_SIZES = (
  Field("moe.num_experts", "num_experts"),
  Field("moe.top_k", "num_experts_per_tok"),
  Field("moe.expert_dim", "moe_intermediate_size"),
  Field("moe.shared_dim", "shared_expert_intermediate_size"),
)
SILU = {"hidden_act": ("silu",)}
WINDOW = Field("window", "sliding_window", 0, to_theirs=lambda tokens: tokens or None)
WINDOW_OFF: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,)}


def renormalized(model: Model) -> str:
  """Returns why a family that always divides the gates by their sum has no such model, or ""."""
  if model.moe.top_k == 1 and model.moe.num_experts:
    return "moe.top_k=1: its only gate is always 1, so its router does not learn"
  return ""


def shared_width(model: Model) -> str:
  """Returns why a family whose shared expert has a width of its own has no such model, or ""."""
  return "" if model.moe.shared_dim else "moe.shared_dim=0: its shared expert has its own width"


def whole_width(model: Model) -> str:
  """Returns why a family without a head_dim of its own has no such model, or ""."""
  if model.num_heads * model.head_dim != model.dim:
    return f"num_heads={model.num_heads} x head_dim={model.head_dim} is not dim={model.dim}"
  return ""


def shared_renormalized(model: Model) -> str:
  """Returns why a family whose MoE layers have shared experts has no such model, or ""."""
  if not model.moe.shared_experts:
    return "moe.shared_experts=0: it has at least one"
  return norm_topk_prob(model)


LATENT = (
  *(field for field in COMMON if field.ours != "head_dim"), DENSE_WIDTH,
  Field("latent.kv_dim", "kv_lora_rank", 512),
  Field("latent.query_dim", "q_lora_rank", 0, to_theirs=lambda width: width or None),
  Field("latent.rotary_dim", "qk_rope_head_dim", 64), Field("latent.value_dim", "v_head_dim", 128),
  Field("moe.top_k", "num_experts_per_tok"), Field("moe.expert_dim", "moe_intermediate_size"),
)  # fmt: skip
PLAIN_LATENT: dict[str, tuple[Any, ...]] = SILU | {
  "attention_bias": (False,),
  "mlp_bias": (False,),
  "moe_layer_freq": (1,),
}
HEAD_DIM: dict[str, Callable[[Mapping[str, Any]], Any]] = {
  "head_dim": lambda theirs: (
    theirs.get("qk_nope_head_dim", 128) + theirs.get("qk_rope_head_dim", 64)
  )
}
DEEPSEEK = (
  *MLP_EXPERTS, *dense("ffn.shared", "mlp.shared_experts"),
  Row("attention.q_down_DQ", "self_attn.q_a_proj.weight", "QD"),
  Row("attention.q_latent_norm.norm_Q", "self_attn.q_a_layernorm.weight", "Q"),
  Row("attention.q_up_QHA", "self_attn.q_b_proj.weight", "(HA)Q"),
  Row("attention.kv_down_DU", "self_attn.kv_a_proj_with_mqa.weight", "UD"),
  Row("attention.kv_latent_norm.norm_W", "self_attn.kv_a_layernorm.weight", "W"),
  Row("attention.kv_up_WHY", "self_attn.kv_b_proj.weight", "(HY)W"),
  Row("attention.out_HXD", "self_attn.o_proj.weight", "D(HX)"),
)  # fmt: skip


_DELTA = (
  *(row for row in ATTENTION if row.ours != "attention.q_DHA"),
  Row("attention.q_DHA,attention.gate_DHA", "self_attn.q_proj.weight", "(H2A)D"),
  Row("attention.conv_UC", "linear_attn.conv1d.weight", "U1C"),
  Row("attention.log_rate_O", "linear_attn.A_log", "O"),
  Row("attention.rate_bias_O", "linear_attn.dt_bias", "O"),
  Row("attention.norm.norm_X", "linear_attn.norm.weight", "X"),
  Row("attention.out_OXD", "linear_attn.out_proj.weight", "D(OX)"),
)
DELTA = (  # of Qwen3-Next
  *_DELTA,
  Row("attention.qkvz_DJY", "linear_attn.in_proj_qkvz.weight", "(JY)D"),
  Row("attention.ba_DJR", "linear_attn.in_proj_ba.weight", "(JR)D"),
)
DELTA_APART = (  # of Qwen3.5
  *_DELTA,
  Row("attention.qkvz_DJY[qkv]", "linear_attn.in_proj_qkv.weight", "(JY)D"),
  Row("attention.qkvz_DJY[z]", "linear_attn.in_proj_z.weight", "(JY)D"),
  Row("attention.ba_DJR[b]", "linear_attn.in_proj_b.weight", "(JR)D"),
  Row("attention.ba_DJR[a]", "linear_attn.in_proj_a.weight", "(JR)D"),
)
DELTA_SIZES = (
  Field("delta.value_heads", "linear_num_value_heads", 32),
  Field("delta.key_heads", "linear_num_key_heads", 16),
  Field("delta.key_dim", "linear_key_head_dim", 128),
  Field("delta.value_dim", "linear_value_head_dim", 128),
  Field("delta.conv_width", "linear_conv_kernel_dim", 4),
)


def stacked(block: str = "mlp", router: str = "gate") -> tuple[Row, ...]:
  """Returns the rows of experts in one tensor, as Qwen3.5 has and transformers 5 holds."""
  return (
    Row("ffn.router_DE", f"{block}.{router}.weight", "ED"),
    Row("bias_ZE", f"{block}.e_score_correction_bias", "E"),
    Row("ffn.gate_EDF,ffn.up_EDF", f"{block}.experts.gate_up_proj", "E(2F)D"),
    Row("ffn.down_EFD", f"{block}.experts.down_proj", "EDF"),
  )


def also_stacked(family: Family) -> Family:
  """Returns the family, which reads files with one tensor for all experts as well."""
  apart = any("{expert}" in row.theirs for row in family.layer)
  return family._replace(stacked=stacked()) if apart else family


def nope(model: Model) -> dict[str, Any]:
  """Returns their field for the part of a head that is not rotated."""
  return {"qk_nope_head_dim": model.head_dim - model.latent.rotary_dim}


def if_grouped(name: str) -> Callable[[Mapping[str, Any]], Any]:
  """Returns what reads a field of theirs that routers have which choose groups first, else 1."""

  def read(theirs: Mapping[str, Any]) -> Any:
    given = {field: value for field, value in theirs.items() if value is not None}
    return given[name] if given.get("topk_method", "greedy") != "greedy" else 1

  return read


def embedding_of_width(model: Model) -> str:
  """Returns why a family that multiplies embeddings by sqrt(D) has no such model, or ""."""
  if math.isclose(model.embedding_multiplier, model.dim**0.5, rel_tol=1e-6):
    return ""
  return f"embedding_multiplier={model.embedding_multiplier}: it has the root of dim={model.dim}"


def one_window(model: Model) -> str:
  """Returns why a family with its window in all layers has no such model, or ""."""
  if model.window and model.global_every:
    return f"global_every={model.global_every}: all its layers have the window"
  return ""


SLIDING, LINEAR, FULL = "sliding_attention", "linear_attention", "full_attention"


def global_every(types: list[str], other: str) -> int:
  """Their list of the layers' types -> n, where every n-th attends fully, not as `other`; or 0."""
  every = next((n for n, kind in enumerate(types, 1) if kind != other), 0)
  for number, kind in enumerate(types, 1):
    if (kind == other) == (every > 0 and number % every == 0):
      raise ValueError(f"layer_types={types} is no repetition of {other} and one full layer")
  return every


def layer_types(model: Model, other: str) -> dict[str, Any]:
  """Returns their list of the layers' types, of which `other` is that with a window or a state."""
  full = [not kind.mask.window and not kind.delta for kind in layer_kinds(model)]
  return {"layer_types": [FULL if is_full else other for is_full in full]}


def delta_types(theirs: Mapping[str, Any]) -> list[str]:
  """Returns the types of the layers of Qwen's models, which older files say by an interval."""
  every = theirs.get("full_attention_interval", 4)
  layers = range(1, theirs["num_hidden_layers"] + 1)
  return theirs.get("layer_types") or [LINEAR if n % every else FULL for n in layers]


def norm_topk_prob(model: Model) -> str:
  """Returns why a family with the field norm_topk_prob has no such model, or ""."""
  return renormalized(model) if model.moe.renormalize else ""


def _dense_layers(theirs: Mapping[str, Any]) -> tuple[int, str]:
  """Returns how many layers of theirs are dense at first, and which others are."""
  layers = set(theirs.get("mlp_only_layers") or [])
  first = next(n for n in range(len(layers) + 1) if n not in layers)
  return first, ",".join(str(n) for n in sorted(layers) if n > first)


PERIOD = Field("moe.every", "decoder_sparse_step", 1)
DENSE_LAYERS: dict[str, Any] = dict(
  read={
    "moe.first_dense": lambda theirs: _dense_layers(theirs)[0],
    "moe.dense_layers": lambda theirs: _dense_layers(theirs)[1],
  },
  written=lambda model: {
    "mlp_only_layers": [
      *range(model.moe.first_dense),
      *map(int, filter(None, model.moe.dense_layers.split(","))),
    ]
  },
)


def qwen_period(model: Model) -> str:
  """Returns why Qwen, which counts `every` from layer 0, has no such model, or ""."""
  if model.moe.every > 1 and model.moe.first_dense % model.moe.every:
    return f"moe.first_dense={model.moe.first_dense} is no multiple of moe.every={model.moe.every}"
  return norm_topk_prob(model)
