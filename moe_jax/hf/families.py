"""The families of models that can be read and written, one table for each.

To add one: say in `fields` which of its config.json mean which of ours, in `fixed` what it always
has, in `allowed` what we can express of a choice, and in `layer` where its tensors stand.
tests/hf compares every family with transformers.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax.config import Model, UserError
from moe_jax.hf.fields import Family, Field
from moe_jax.hf.layout import Row
from moe_jax.options import QKNorm, Score

TOP = (
  Row("embed_VD", "model.embed_tokens.weight", "VD"),
  Row("final_norm.norm_D", "model.norm.weight", "D"),
  Row("head_DV", "lm_head.weight", "VD"),
)
LAYER = "model.layers.{layer}."  # the prefix of a layer's tensors
# Tensors of older checkpoints that are computed from the config.
COMPUTED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

_ATTENTION = (
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


def _dense(ours: str, theirs: str) -> tuple[Row, ...]:
  return (
    Row(f"{ours}.gate_DF", f"{theirs}.gate_proj.weight", "FD"),
    Row(f"{ours}.up_DF", f"{theirs}.up_proj.weight", "FD"),
    Row(f"{ours}.down_FD", f"{theirs}.down_proj.weight", "DF"),
  )


def _experts(theirs: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
  return (
    Row("ffn.gate_EDF", f"{theirs}.experts.{{expert}}.{gate}.weight", "FD"),
    Row("ffn.up_EDF", f"{theirs}.experts.{{expert}}.{up}.weight", "FD"),
    Row("ffn.down_EFD", f"{theirs}.experts.{{expert}}.{down}.weight", "DF"),
  )


_DENSE = (*_ATTENTION, *_dense("ffn", "mlp"))
_MLP_EXPERTS = (
  *_DENSE,  # layers without experts
  Row("ffn.router_DE", "mlp.gate.weight", "ED"),
  *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
)


def _head_dim(theirs: Mapping[str, Any]) -> int | None:
  width, heads = theirs.get("hidden_size"), theirs.get("num_attention_heads")
  return width // heads if width and heads else None


_COMMON = (
  Field("vocab_size", "vocab_size"),
  Field("num_layers", "num_hidden_layers"),
  Field("dim", "hidden_size"),
  Field("num_heads", "num_attention_heads"),
  Field("num_kv_heads", "num_key_value_heads", lambda theirs: theirs.get("num_attention_heads")),
  Field("head_dim", "head_dim", _head_dim),
  Field("norm_eps", "rms_norm_eps", 1e-6),
  Field("tied_head", "tie_word_embeddings", False),
)
_DENSE_WIDTH = Field("ffn_dim", "intermediate_size")
_BIASES = (
  Field("qkv_bias", "attention_bias", False),
  Field("out_bias", "attention_bias", False),
)
_SILU = {"hidden_act": ("silu",)}
_NO_WINDOW: dict[str, tuple[Any, ...]] = {"sliding_window": ()}
_WINDOW_OFF: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,)}


def _renormalized(model: Model) -> str:
  if model.moe.top_k == 1 and model.moe.num_experts:
    return "moe.top_k=1: its only gate is always 1, so its router does not learn"
  return ""


def _whole_width(model: Model) -> str:
  if model.num_heads * model.head_dim != model.dim:
    return f"num_heads={model.num_heads} x head_dim={model.head_dim} is not dim={model.dim}"
  return ""


def _dense_first(layers: list[int]) -> int:
  """Their list of dense layers -> how many come first."""
  if sorted(layers) != list(range(len(layers))):
    raise ValueError("dense layers that are not the first ones cannot be expressed")
  return len(layers)


def _norm_topk_prob(model: Model) -> str:
  return _renormalized(model) if model.moe.renormalize else ""


_QWEN_LAYERS = (
  Field("moe.every", "decoder_sparse_step", 1),
  Field("moe.first_dense", "mlp_only_layers", [], _dense_first, lambda n: list(range(n))),
)


def _qwen_period(model: Model) -> str:
  """Qwen counts `every` from layer 0, and we from first_dense."""
  if model.moe.every > 1 and model.moe.first_dense % model.moe.every:
    return (f"moe.first_dense={model.moe.first_dense} is no multiple of moe.every="
            f"{model.moe.every}")  # fmt: skip
  return _norm_topk_prob(model)


_ALL = [
  Family(
    "mixtral", "MixtralForCausalLM",
    fields=(
      *_COMMON, Field("moe.num_experts", "num_local_experts"),
      Field("moe.top_k", "num_experts_per_tok"), Field("moe.expert_dim", "intermediate_size"),
    ),
    layer=(
      *_ATTENTION, Row("ffn.router_DE", "block_sparse_moe.gate.weight", "ED"),
      *_experts("block_sparse_moe", "w1", "w3", "w2"),
    ),
    allowed=_SILU | _NO_WINDOW, check=_renormalized, rope_base=1e6,
  ),
  Family(
    "olmoe", "OlmoeForCausalLM",
    fields=(
      *_COMMON, *_BIASES, Field("moe.num_experts", "num_experts"),
      Field("moe.top_k", "num_experts_per_tok"), Field("moe.expert_dim", "intermediate_size"),
      Field("moe.renormalize", "norm_topk_prob", False),
    ),
    layer=_MLP_EXPERTS, fixed={"qk_norm": QKNorm.WIDTH}, allowed=_SILU | {"clip_qkv": ()},
    check=lambda model: _whole_width(model) or _norm_topk_prob(model),
  ),
  Family(
    "qwen2_moe", "Qwen2MoeForCausalLM",
    fields=(
      *_COMMON, *_QWEN_LAYERS, _DENSE_WIDTH, Field("qkv_bias", "qkv_bias", True),
      Field("moe.num_experts", "num_experts"), Field("moe.top_k", "num_experts_per_tok"),
      Field("moe.expert_dim", "moe_intermediate_size"),
      Field("moe.shared_dim", "shared_expert_intermediate_size"),
      Field("moe.renormalize", "norm_topk_prob", False),
    ),
    layer=(
      *_MLP_EXPERTS, *_dense("ffn.shared", "mlp.shared_expert"),
      Row("ffn.shared_gate_D", "mlp.shared_expert_gate.weight", "1D"),
    ),
    fixed={"moe.shared_experts": 1, "moe.shared_gate": True}, allowed=_SILU | _WINDOW_OFF,
    check=lambda model: _qwen_period(model) or (
      "" if model.moe.shared_dim else "moe.shared_dim=0: its shared expert has a width of its own"),
  ),
  Family(
    "qwen3_moe", "Qwen3MoeForCausalLM",
    fields=(
      *_COMMON, *_QWEN_LAYERS, *_BIASES, _DENSE_WIDTH,
      Field("moe.num_experts", "num_experts", also="num_local_experts"),
      Field("moe.top_k", "num_experts_per_tok"),
      Field("moe.expert_dim", "moe_intermediate_size"),
      Field("moe.renormalize", "norm_topk_prob", False),
    ),
    layer=_MLP_EXPERTS, fixed={"qk_norm": QKNorm.HEAD}, allowed=_SILU | _WINDOW_OFF,
    check=_qwen_period,
  ),
  Family(
    "granitemoe", "GraniteMoeForCausalLM",
    fields=(
      *_COMMON, *_BIASES, Field("moe.num_experts", "num_local_experts"),
      Field("moe.top_k", "num_experts_per_tok"), Field("moe.expert_dim", "intermediate_size"),
      Field("embedding_multiplier", "embedding_multiplier", 1.0),
      Field("residual_multiplier", "residual_multiplier", 1.0),
      Field("attention_scale", "attention_multiplier", 1.0),
      Field("logit_multiplier", "logits_scaling", 1.0, lambda x: 1 / x, lambda x: 1 / x),
    ),
    layer=(
      *_ATTENTION, Row("ffn.router_DE", "block_sparse_moe.router.layer.weight", "ED"),
      Row("ffn.gate_EDF,ffn.up_EDF", "block_sparse_moe.input_linear.weight", "E(2F)D"),
      Row("ffn.down_EFD", "block_sparse_moe.output_linear.weight", "EDF"),
    ),
    allowed=_SILU, check=_renormalized,
  ),
  Family(
    "glm4_moe", "Glm4MoeForCausalLM",
    fields=(
      *_COMMON, _DENSE_WIDTH, Field("qkv_bias", "attention_bias", False),
      Field("qk_norm", "use_qk_norm", False,
            lambda on: QKNorm.HEAD if on else QKNorm.NONE, lambda kind: kind == "head"),
      Field("moe.num_experts", "n_routed_experts"), Field("moe.top_k", "num_experts_per_tok"),
      Field("moe.expert_dim", "moe_intermediate_size"),
      Field("moe.shared_experts", "n_shared_experts", 0),
      Field("moe.renormalize", "norm_topk_prob", True),
      Field("moe.gate_scale", "routed_scaling_factor", 1.0),
      Field("moe.expert_groups", "n_group", 1), Field("moe.top_groups", "topk_group", 1),
      Field("moe.first_dense", "first_k_dense_replace", 0),
    ),
    layer=(
      *_MLP_EXPERTS, Row("bias_ZE", "mlp.gate.e_score_correction_bias", "E"),
      *_dense("ffn.shared", "mlp.shared_experts"),
    ),
    fixed={"moe.score": Score.SIGMOID}, allowed=_SILU, partial_rotary=0.5,
    check=lambda model: _norm_topk_prob(model) or (
      "" if model.moe.shared_experts else "moe.shared_experts=0: it has at least one"),
    left_out=r"model\.layers\.{num_layers}\..*", why_left_out="the multi-token prediction layer",
  ),
  Family(
    "minimax_m2", "MiniMaxM2ForCausalLM",
    fields=(
      *_COMMON, Field("moe.num_experts", "num_local_experts"),
      Field("moe.top_k", "num_experts_per_tok"), Field("moe.expert_dim", "intermediate_size"),
    ),
    layer=(
      *_ATTENTION, Row("ffn.router_DE", "block_sparse_moe.gate.weight", "ED"),
      Row("bias_ZE", "block_sparse_moe.e_score_correction_bias", "E"),
      *_experts("block_sparse_moe", "w1", "w3", "w2"),
    ),
    fixed={"moe.score": Score.SIGMOID, "qk_norm": QKNorm.WIDTH}, allowed=_SILU,
    check=_renormalized, rope_base=5e6, partial_rotary=1.0,
    left_out=r"model\.layers\.{num_layers}\..*", why_left_out="multi-token prediction",
  ),
  Family(
    "llama", "LlamaForCausalLM", fields=(*_COMMON, *_BIASES, _DENSE_WIDTH), layer=_DENSE,
    allowed=_SILU | {"mlp_bias": (False,)},
  ),
  Family(
    "mistral", "MistralForCausalLM", fields=(*_COMMON, _DENSE_WIDTH), layer=_DENSE,
    allowed=_SILU | _NO_WINDOW,
  ),
  Family(
    "qwen2", "Qwen2ForCausalLM", fields=(*_COMMON, _DENSE_WIDTH), layer=_DENSE,
    fixed={"qkv_bias": True}, allowed=_SILU | _WINDOW_OFF,
  ),
  Family(
    "qwen3", "Qwen3ForCausalLM", fields=(*_COMMON, *_BIASES, _DENSE_WIDTH), layer=_DENSE,
    fixed={"qk_norm": QKNorm.HEAD}, allowed=_SILU | _WINDOW_OFF,
  ),
]  # fmt: skip
FAMILIES = {family.model_type: family for family in _ALL}


def family_of(theirs: Mapping[str, Any], where: str) -> Family:
  """Returns the family of a config.json; raises a UserError for one that is not known."""
  name = theirs.get("model_type")
  if name not in FAMILIES:
    raise UserError(f"{where}: model_type={name!r} is not known; there are {', '.join(FAMILIES)}")
  return FAMILIES[name]
