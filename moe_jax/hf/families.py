"""The families of models that can be read and written, one table for each.

To add one: say in `fields` which of its config.json mean which of ours, in `fixed` what it always
has, in `allowed` what we can express of a choice, and in `layer` where its tensors stand.
tests/hf compares every family with transformers.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax.config import Activation, GroupScore, QKNorm, Score
from moe_jax.errors import UserError
from moe_jax.hf import parts
from moe_jax.hf.fields import Family, Field
from moe_jax.hf.layout import Row

_QWEN_DELTA: dict[str, Any] = dict(
  fixed={
    "moe.shared_experts": 1,
    "moe.shared_gate": True,
    "qk_norm": QKNorm.HEAD,
    "attention_gate": True,
    "norm_offset": True,
  },
  read={"global_every": lambda theirs: parts.global_every(parts.delta_types(theirs), parts.LINEAR)},
  written=lambda model: parts.layer_types(model, parts.LINEAR),
  allowed=parts.SILU | {"attention_bias": (False,)},
  partial_rotary=0.25,
)
_ALL = [
  Family(
    "mixtral", "MixtralForCausalLM",
    defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    fields=(
      *parts.COMMON, parts.WINDOW, *parts.LOCAL_EXPERTS,
    ),
    layer=(
      *parts.ATTENTION, Row("ffn.router_DE", "block_sparse_moe.gate.weight", "ED"),
      *parts.expert_rows("block_sparse_moe", "w1", "w3", "w2"),
    ),
    allowed=parts.SILU, rope_base=1e6,
    check=lambda model: parts.one_window(model) or parts.renormalized(model),
  ),
  Family(
    "olmoe", "OlmoeForCausalLM",
    defaults={"rms_norm_eps": 1e-5},
    fields=(
      *parts.COMMON, *parts.BIASES, Field("moe.num_experts", "num_experts"),
      Field("moe.top_k", "num_experts_per_tok"), Field("moe.expert_dim", "intermediate_size"),
      Field("moe.renormalize", "norm_topk_prob", False),
    ),
    layer=parts.MLP_EXPERTS, fixed={"qk_norm": QKNorm.WIDTH}, allowed=parts.SILU | {"clip_qkv": ()},
    check=lambda model: parts.whole_width(model) or parts.norm_topk_prob(model),
  ),
  Family(
    "qwen2_moe", "Qwen2MoeForCausalLM",
    defaults={"num_key_value_heads": 16},
    fields=(
      *parts.COMMON, parts.PERIOD, parts.DENSE_WIDTH, Field("qkv_bias", "qkv_bias", True),
      *parts.QWEN_SIZES,
      Field("moe.renormalize", "norm_topk_prob", False),
    ),
    layer=(*parts.ATTENTION, *parts.QWEN_SHARED),
    fixed={"moe.shared_experts": 1, "moe.shared_gate": True}, allowed=parts.SILU | parts.WINDOW_OFF,
    **parts.DENSE_LAYERS,
    check=lambda model: parts.qwen_period(model) or parts.shared_width(model),
  ),
  Family(
    "qwen3_moe", "Qwen3MoeForCausalLM",
    defaults={"num_key_value_heads": 4},
    fields=(
      *parts.COMMON, parts.PERIOD, *parts.BIASES, parts.DENSE_WIDTH,
      Field("moe.num_experts", "num_experts", also="num_local_experts"),
      Field("moe.top_k", "num_experts_per_tok"),
      Field("moe.expert_dim", "moe_intermediate_size"),
      Field("moe.renormalize", "norm_topk_prob", False),
    ),
    layer=parts.MLP_EXPERTS, fixed={"qk_norm": QKNorm.HEAD}, allowed=parts.SILU | parts.WINDOW_OFF,
    **parts.DENSE_LAYERS, check=parts.qwen_period,
  ),
  Family(
    "granitemoe", "GraniteMoeForCausalLM",
    fields=(
      *parts.COMMON, *parts.BIASES, *parts.LOCAL_EXPERTS,
      Field("embedding_multiplier", "embedding_multiplier", 1.0),
      Field("residual_multiplier", "residual_multiplier", 1.0),
      Field("attention_scale", "attention_multiplier", 1.0),
      Field("logit_multiplier", "logits_scaling", 1.0, lambda x: 1 / x, lambda x: 1 / x),
    ),
    layer=(
      *parts.ATTENTION, Row("ffn.router_DE", "block_sparse_moe.router.layer.weight", "ED"),
      Row("ffn.gate_EDF,ffn.up_EDF", "block_sparse_moe.input_linear.weight", "E(2F)D"),
      Row("ffn.down_EFD", "block_sparse_moe.output_linear.weight", "EDF"),
    ),
    stacked=parts.stacked("block_sparse_moe", "router"),
    allowed=parts.SILU, check=parts.renormalized,
  ),
  Family(
    "glm4_moe", "Glm4MoeForCausalLM",
    defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "first_k_dense_replace": 1,
              "n_shared_experts": 1},
    fields=(
      *parts.COMMON, parts.DENSE_WIDTH, Field("qkv_bias", "attention_bias", False),
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
      *parts.MLP_EXPERTS, Row("bias_ZE", "mlp.gate.e_score_correction_bias", "E"),
      *parts.dense("ffn.shared", "mlp.shared_experts"),
    ),
    fixed={"moe.score": Score.SIGMOID}, allowed=parts.SILU, partial_rotary=0.5,
    check=parts.shared_renormalized,
    left_out=r"model\.layers\.{num_layers}\..*", why_left_out="the multi-token prediction layer",
  ),
  Family(
    "minimax_m2", "MiniMaxM2ForCausalLM",
    defaults={"num_key_value_heads": 8, "head_dim": 128},
    fields=(
      *parts.COMMON, *parts.LOCAL_EXPERTS,
    ),
    layer=(
      *parts.ATTENTION, Row("ffn.router_DE", "block_sparse_moe.gate.weight", "ED"),
      Row("bias_ZE", "block_sparse_moe.e_score_correction_bias", "E"),
      *parts.expert_rows("block_sparse_moe", "w1", "w3", "w2"),
    ),
    fixed={"moe.score": Score.SIGMOID, "qk_norm": QKNorm.WIDTH}, allowed=parts.SILU,
    check=parts.renormalized, rope_base=5e6, partial_rotary=1.0,
    left_out=r"model\.layers\.{num_layers}\..*", why_left_out="multi-token prediction",
  ),
  Family(
    "gpt_oss", "GptOssForCausalLM",
    defaults={"num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
              "sliding_window": 128},
    fields=(
      *parts.COMMON, parts.WINDOW,
      Field("qkv_bias", "attention_bias", True), Field("out_bias", "attention_bias", True),
      Field("activation_limit", "swiglu_limit", 7.0),
      *parts.LOCAL_EXPERTS,
    ),
    layer=(
      *parts.ATTENTION, Row("attention.sinks_H", "self_attn.sinks", "H"),
      Row("ffn.router_DE", "mlp.router.weight", "ED"),
      Row("ffn.router_bias_E", "mlp.router.bias", "E"),
      Row("ffn.gate_EDF,ffn.up_EDF", "mlp.experts.gate_up_proj", "ED(F2)"),
      Row("ffn.gate_bias_EF,ffn.up_bias_EF", "mlp.experts.gate_up_proj_bias", "E(F2)"),
      Row("ffn.down_EFD", "mlp.experts.down_proj", "EFD"),
      Row("ffn.down_bias_ED", "mlp.experts.down_proj_bias", "ED"),
    ),
    fixed={"sinks": True, "activation": Activation.CLAMPED_SWIGLU, "moe.expert_bias": True,
           "moe.router_bias": True},
    allowed=parts.SILU | {"swiglu_alpha": (1.702,)}, rope_base=150_000.0,
    rope={"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
          "truncate": False},
    check=parts.renormalized,
    read={"global_every": lambda theirs: parts.global_every(
      theirs.get("layer_types") or [parts.SLIDING, parts.FULL], parts.SLIDING)},
    written=lambda model: parts.layer_types(model, parts.SLIDING),
  ),
  Family(
    "deepseek_v2", "DeepseekV2ForCausalLM",
    defaults={"q_lora_rank": 1536},
    fields=(
      *parts.LATENT, Field("moe.num_experts", "n_routed_experts", 64),
      Field("moe.shared_experts", "n_shared_experts", 2),
      Field("moe.gate_scale", "routed_scaling_factor", 1.0),
      Field("moe.first_dense", "first_k_dense_replace", 0),
    ),
    layer=parts.DEEPSEEK,
    fixed={"rope_interleaved": True, "moe.renormalize": False,
           "moe.group_score": GroupScore.BEST},
    allowed=parts.PLAIN_LATENT | {"norm_topk_prob": (False,), "scoring_func": ("softmax",)},
    read=parts.HEAD_DIM | {
      "moe.expert_groups": parts.if_grouped("n_group"),
      "moe.top_groups": parts.if_grouped("topk_group"),
    },
    written=lambda model: parts.nope(model) | {
      "topk_method": "group_limited_greedy" if model.moe.expert_groups > 1 else "greedy",
      "n_group": model.moe.expert_groups, "topk_group": model.moe.top_groups},
    scores_mscale=True,
  ),
  Family(
    "deepseek_v3", "DeepseekV3ForCausalLM",
    defaults={"num_key_value_heads": 128, "q_lora_rank": 1536},
    fields=(
      *parts.LATENT, Field("moe.num_experts", "n_routed_experts", 256),
      Field("moe.shared_experts", "n_shared_experts", 1),
      Field("moe.gate_scale", "routed_scaling_factor", 2.5),
      Field("moe.renormalize", "norm_topk_prob", True),
      Field("moe.expert_groups", "n_group", 8), Field("moe.top_groups", "topk_group", 4),
      Field("moe.first_dense", "first_k_dense_replace", 3),
      Field("rope_interleaved", "rope_interleave", True),
    ),
    layer=(*parts.DEEPSEEK, Row("bias_ZE", "mlp.gate.e_score_correction_bias", "E")),
    fixed={"moe.score": Score.SIGMOID},
    allowed=parts.PLAIN_LATENT | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    read=parts.HEAD_DIM, written=lambda model: parts.nope(model), check=parts.shared_renormalized,
    scores_mscale=True,
    left_out=r"model\.layers\.{num_layers}\..*", why_left_out="the multi-token prediction layer",
  ),
  Family(
    "qwen3_next", "Qwen3NextForCausalLM",
    defaults={"num_key_value_heads": 2, "head_dim": 256},
    fields=(
      *parts.COMMON, parts.PERIOD, *parts.DELTA_SIZES, parts.DENSE_WIDTH,
      *parts.QWEN_SIZES,
      Field("moe.renormalize", "norm_topk_prob", True),
    ),
    layer=(*parts.DELTA, *parts.QWEN_SHARED),
    **_QWEN_DELTA | {
      "read": _QWEN_DELTA["read"] | parts.DENSE_LAYERS["read"],
      "written": lambda model: (
        parts.layer_types(model, parts.LINEAR) | parts.DENSE_LAYERS["written"](model)
      ),
    },
    check=lambda model: parts.qwen_period(model) or parts.shared_width(model),
    left_out=r"mtp\..*", why_left_out="the multi-token prediction layer",
  ),
  Family(
    "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM",
    defaults={"num_key_value_heads": 2, "head_dim": 256},
    fields=(
      *parts.COMMON, *parts.DELTA_SIZES, *parts.QWEN_SIZES,
    ),
    layer=(*parts.DELTA_APART, *parts.QWEN_SHARED),
    **_QWEN_DELTA,
    check=lambda model: parts.renormalized(model) or parts.shared_width(model),
    left_out=r"mtp\..*|model\.visual\..*", why_left_out="multi-token prediction or vision",
  ),
  Family(
    "llama", "LlamaForCausalLM",
    fields=(*parts.COMMON, *parts.BIASES, parts.DENSE_WIDTH), layer=parts.DENSE,
    allowed=parts.SILU | {"mlp_bias": (False,)},
  ),
  Family(
    "mistral", "MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    fields=(*parts.COMMON, parts.WINDOW, parts.DENSE_WIDTH), layer=parts.DENSE,
    allowed=parts.SILU, check=lambda model: parts.one_window(model),
  ),
  Family(
    "qwen2", "Qwen2ForCausalLM", fields=(*parts.COMMON, parts.DENSE_WIDTH), layer=parts.DENSE,
    defaults={"num_key_value_heads": 32},
    fixed={"qkv_bias": True}, allowed=parts.SILU | parts.WINDOW_OFF,
  ),
  Family(
    "qwen3", "Qwen3ForCausalLM",
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    fields=(*parts.COMMON, *parts.BIASES, parts.DENSE_WIDTH), layer=parts.DENSE,
    fixed={"qk_norm": QKNorm.HEAD}, allowed=parts.SILU | parts.WINDOW_OFF,
  ),
  Family(
    "vaultgemma", "VaultGemmaForCausalLM",
    defaults={"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
              "tie_word_embeddings": True, "attn_logit_softcapping": 50.0,
              "final_logit_softcapping": 30.0},
    fields=(
      *parts.COMMON, *parts.BIASES, parts.DENSE_WIDTH, parts.WINDOW,
      Field("soft_cap", "attn_logit_softcapping", 0.0, to_theirs=lambda cap: cap or None),
      Field("logit_soft_cap", "final_logit_softcapping", 0.0, to_theirs=lambda cap: cap or None),
    ),
    layer=(
      *(row for row in parts.DENSE if row.ours != "ffn_norm.norm_D"),
      Row("ffn_norm.norm_D", "pre_feedforward_layernorm.weight", "D"),
    ),
    fixed={"norm_offset": True, "activation": Activation.GEGLU},
    allowed={"hidden_activation": ("gelu_pytorch_tanh",)},
    read={
      "attention_scale": lambda theirs: theirs.get("query_pre_attn_scalar", 256) ** -0.5,
      "embedding_multiplier": lambda theirs: theirs["hidden_size"] ** 0.5,
      "global_every": lambda theirs: parts.global_every(
        theirs.get("layer_types") or [parts.SLIDING, parts.FULL], parts.SLIDING),
    },
    written=lambda model: parts.layer_types(model, parts.SLIDING) | {
      "query_pre_attn_scalar": round((model.attention_scale or model.head_dim**-0.5) ** -2)},
    check=parts.embedding_of_width,
  ),
]  # fmt: skip
_SAME = {"kimi_k2": "deepseek_v3"}  # other names of a family
FAMILIES = {family.model_type: family for family in map(parts.also_stacked, _ALL)}


def family_of(theirs: Mapping[str, Any], where: str) -> Family:
  """Returns the family of a config.json; raises a UserError for one that is not known."""
  name = theirs.get("model_type")
  name = _SAME.get(name, name) if isinstance(name, str) else name
  if name not in FAMILIES:
    raise UserError(f"{where}: model_type={name!r} is not known; there are {', '.join(FAMILIES)}")
  return FAMILIES[name]
