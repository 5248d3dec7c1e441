"""Tiny models of each family, with random weights, as transformers builds and writes them."""

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest

from moe_jax.data import tokenizers

MISSING = "compares with Hugging Face: pip install -e '.[hf]'"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)

# Odd sizes, at least two layers of each kind, every option on that the family has.
COMMON: dict[str, Any] = dict(
  vocab_size=37,
  hidden_size=20,
  num_hidden_layers=3,
  num_attention_heads=6,
  num_key_value_heads=2,
  head_dim=6,
  max_position_embeddings=96,
  rms_norm_eps=1e-4,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=None,
  initializer_range=0.02,
)
_YARN = {
  "rope_type": "yarn",
  "rope_theta": 500.0,
  "factor": 3.0,
  "beta_fast": 8.0,
  "original_max_position_embeddings": 32,
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 300.0, "factor": 4.0, "low_freq_factor": 1.0,
           "high_freq_factor": 3.0, "original_max_position_embeddings": 24}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}


def _theta(base: float) -> dict[str, Any]:
  return {"rope_type": "default", "rope_theta": base}


CONFIGS: dict[str, dict[str, Any]] = {
  "mixtral": dict(
    model_type="mixtral", num_local_experts=5, num_experts_per_tok=2, intermediate_size=14,
    rope_parameters=_theta(100.0), router_aux_loss_coef=0.02,
  ),
  "olmoe": dict(
    model_type="olmoe", num_experts=7, num_experts_per_tok=3, intermediate_size=6, hidden_size=24,
    num_attention_heads=6, head_dim=4, attention_bias=True, norm_topk_prob=False,
    rope_parameters=_LINEAR,
  ),
  "qwen2_moe": dict(
    model_type="qwen2_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8,
    intermediate_size=18, shared_expert_intermediate_size=10, num_hidden_layers=4,
    decoder_sparse_step=2, norm_topk_prob=False, qkv_bias=True, rope_parameters=_YARN,
  ),
  "qwen3_moe": dict(
    model_type="qwen3_moe", num_experts=9, num_experts_per_tok=4, moe_intermediate_size=4,
    intermediate_size=18, mlp_only_layers=[0, 2], num_hidden_layers=4, norm_topk_prob=True,
    attention_bias=True,
    rope_parameters=_theta(1000.0),
  ),
  "granitemoe": dict(
    model_type="granitemoe", num_local_experts=6, num_experts_per_tok=3, intermediate_size=8,
    attention_bias=True, embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=6.0,
    attention_multiplier=0.3, tie_word_embeddings=True, rope_parameters=_theta(100.0),
  ),
  "glm4_moe": dict(
    model_type="glm4_moe", n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=6,
    intermediate_size=18, n_shared_experts=2, n_group=4, topk_group=2, routed_scaling_factor=1.7,
    first_k_dense_replace=1, head_dim=8, attention_bias=True, use_qk_norm=True,
    norm_topk_prob=True,
    rope_parameters=_theta(100.0) | {"partial_rotary_factor": 0.5}, num_nextn_predict_layers=0,
  ),
  "minimax_m2": dict(
    model_type="minimax_m2", num_local_experts=6, num_experts_per_tok=2, intermediate_size=8,
    head_dim=8, rope_parameters=_theta(100.0) | {"partial_rotary_factor": 0.5},
  ),
  "gpt_oss": dict(
    model_type="gpt_oss", num_local_experts=5, num_experts_per_tok=3, intermediate_size=14,
    sliding_window=7, num_hidden_layers=4, swiglu_limit=1.5,
    rope_parameters=_YARN | {"truncate": False},
  ),
  "deepseek_v2": dict(
    model_type="deepseek_v2", hidden_size=24, n_routed_experts=8, num_experts_per_tok=3,
    moe_intermediate_size=6, intermediate_size=18, n_shared_experts=2, n_group=4, topk_group=2,
    topk_method="group_limited_greedy", routed_scaling_factor=1.7, first_k_dense_replace=1,
    num_key_value_heads=6, q_lora_rank=None, kv_lora_rank=10, qk_nope_head_dim=6, head_dim=4,
    qk_rope_head_dim=4, v_head_dim=7,
    rope_parameters=_YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
  ),
  "deepseek_v3": dict(
    model_type="deepseek_v3", n_routed_experts=8, num_experts_per_tok=4, moe_intermediate_size=6,
    intermediate_size=18, n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=1.7,
    first_k_dense_replace=1, num_key_value_heads=6, q_lora_rank=11, kv_lora_rank=10,
    qk_nope_head_dim=5, qk_rope_head_dim=4, head_dim=4, v_head_dim=7,
    rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, num_nextn_predict_layers=0,
  ),
  "qwen3_next": dict(
    model_type="qwen3_next", num_hidden_layers=4, full_attention_interval=2, num_experts=7,
    num_experts_per_tok=3, moe_intermediate_size=6, intermediate_size=18, head_dim=8,
    shared_expert_intermediate_size=10, norm_topk_prob=True, linear_num_value_heads=6,
    linear_num_key_heads=3, linear_key_head_dim=5, linear_value_head_dim=4,
    rope_parameters=_theta(100.0) | {"partial_rotary_factor": 0.5},
  ),
  "qwen3_5_moe_text": dict(
    model_type="qwen3_5_moe_text", num_hidden_layers=4, num_experts=7, num_experts_per_tok=3,
    layer_types=2 * ["linear_attention", "full_attention"], moe_intermediate_size=6, head_dim=8,
    shared_expert_intermediate_size=10, linear_num_value_heads=6, linear_num_key_heads=3,
    linear_key_head_dim=5, linear_value_head_dim=4,
    rope_parameters=_theta(100.0) | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
  ),
  "llama": dict(
    model_type="llama", intermediate_size=18, hidden_size=36, attention_bias=True,
    rope_parameters=_LLAMA3,
  ),
  "mistral": dict(
    model_type="mistral", intermediate_size=18, sliding_window=9, rope_parameters=_theta(100.0)
  ),
  "qwen2": dict(
    model_type="qwen2", intermediate_size=18, tie_word_embeddings=True,
    rope_parameters=_YARN | {"attention_factor": 1.3},
  ),
  "vaultgemma": dict(
    model_type="vaultgemma", hidden_size=24, intermediate_size=18, sliding_window=7,
    num_hidden_layers=4,
    attn_logit_softcapping=0.7, final_logit_softcapping=2.0, query_pre_attn_scalar=9,
    attention_bias=True, tie_word_embeddings=True, rope_parameters=_theta(100.0),
  ),
  "qwen3": dict(
    model_type="qwen3", intermediate_size=18, attention_bias=True, rope_parameters=_theta(100.0)
  ),
}  # fmt: skip


class Peer(NamedTuple):
  """A model of transformers and the folder that it was saved in."""

  model: Any
  folder: Any


def build(name: str, folder, **changed) -> Peer:
  """A model with random weights, saved as it saves itself."""
  fields = COMMON | CONFIGS[name] | changed
  config = transformers.AutoConfig.for_model(**fields)
  config._experts_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  from_zero = name == "vaultgemma" or "linear_attention" in (
    getattr(config, "layer_types", None) or ()
  )
  rng = np.random.default_rng(sum(map(ord, name)))
  with torch.no_grad():
    for key, weight in (*model.named_parameters(), *_biases(model)):
      values = rng.normal(size=weight.shape)
      if weight.ndim == 1:
        around = 0 if from_zero and "linear_attn.norm" not in key else 1
        values = 0.5 * values if "bias" in key else around + 0.3 * values
        if name == "deepseek_v3" and "correction" in key:
          values -= 0.8  # some sums with scores are negative: a mask of 0 would choose from others
      else:
        large = 10 if "embed" in key else 1 if "linear_attn" in key else 1.5
        values = large * values * weight.shape[-1] ** -0.5
      weight.copy_(torch.tensor(values))
  model.tie_weights()
  model.save_pretrained(folder)
  return Peer(model, folder)


def _biases(model) -> list[tuple[str, Any]]:
  return [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]


class Pieces(tokenizers.Tokenizer):
  """37 ids: the separator 0, and one byte for each other."""

  def __init__(self):
    super().__init__([b""] + [bytes([64 + i]) for i in range(1, 37)], 0, "pieces")

  def encode(self, text):
    return np.frombuffer(text.encode(), np.uint8) - 64


@functools.cache
def tokens(length: int = 23) -> np.ndarray:
  """Ids of two rows."""
  return np.random.default_rng(3).integers(0, COMMON["vocab_size"], (2, length))
