"""The part of a config that makes the model: its decoder, and its MoE layers. Imports no jax."""

import dataclasses

from moe_jax.config.choices import (
  Activation,
  Attention,
  Dispatch,
  Dtype,
  Exchange,
  ExchangeFallback,
  GradientSums,
  GroupedMatmul,
  GroupScore,
  Priority,
  QKNorm,
  Remat,
  RopeKind,
  Router,
  Score,
)
from moe_jax.config.fields import Section, option


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoE(Section):
  """The MoE layers: their experts, who uses which, and how tokens get there."""

  num_experts: int = option(0, "Experts of an MoE layer (E); 0 is a dense model.", at_least=0)
  top_k: int = option(2, "Experts that a token uses (K).", at_least=1)
  expert_dim: int = option(256, "Hidden width of one expert (F).", at_least=1)
  shared_experts: int = option(0, "More experts, which every token uses (2401.06066).", at_least=0)
  shared_dim: int = option(0, "Hidden width of a shared expert; 0 is expert_dim.", at_least=0)
  shared_gate: bool = option(
    False, "sigmoid(x . w) multiplies the shared experts' output (Qwen2-MoE)."
  )
  expert_bias: bool = option(False, "The matrices of experts have biases (gpt-oss).")
  router_bias: bool = option(False, "The router's logits have a learned bias (gpt-oss).")
  router: Router = option(Router.TOPK, "What decides which token uses which experts.")
  score: Score = option(Score.SOFTMAX, "What the router makes of a token's logits.")
  renormalize: bool = option(True, "K > 1: a token's K gates are scaled to sum to 1 (Mixtral).")
  gate_scale: float = option(
    1.0, "Every gate is multiplied by it (DeepSeek-V3: 2.5).", above=0, at_most=1e4
  )
  expert_groups: int = option(
    1, "The experts are divided into so many groups for the choice (DeepSeek-V3).", at_least=1
  )
  top_groups: int = option(1, "A token's experts come from so many of the groups.", at_least=1)
  group_score: GroupScore = option(GroupScore.TWO_BEST, "Which groups those are.")
  bias_update_rate: float = option(
    0.0,
    "u of loss-free balancing by a bias (2408.15664: 1e-3); 0 is no bias.",
    at_least=0,
    at_most=1,
  )
  priority: Priority = option(Priority.TOKEN, "Who finds a slot first when an expert is full.")
  dispatch: Dispatch = option(Dispatch.GATHER, "How tokens are laid out in rows for the experts.")
  grouped_matmul: GroupedMatmul = option(
    GroupedMatmul.AUTO, "The kernel of the experts, with dispatch=grouped."
  )
  exchange: Exchange = option(
    Exchange.AUTO, "How tokens travel over the mesh's `expert` axis, with dispatch=grouped."
  )
  exchange_factor: float = option(
    0.0, "Rows of an exchange buffer over their balanced number; 0 holds any load.", at_least=0
  )
  exchange_fallback: ExchangeFallback = option(
    ExchangeFallback.NONE, "What becomes of rows that an exchange buffer has no room for."
  )
  exchange_chunks: int = option(
    1, "Parts of a device's tokens that travel to experts and back in turn.", at_least=1
  )
  capacity_factor: float = option(
    1.25,
    "Slots of an expert in training over its fair share, T*K/E. A dispatch that never drops "
    "(grouped, dense) has no slots and ignores it; expert_choice takes so many tokens in any case.",
    above=0,
    infinite=True,
  )
  eval_capacity_factor: float = option(2.0, "The same in evaluation.", above=0, infinite=True)
  group_size: int = option(0, "Tokens that compete for slots (T); 0 is one sequence.", at_least=0)
  router_dtype: Dtype = option(
    Dtype.FLOAT32, "Type of the router's logits and scores (2101.03961)."
  )
  jitter: float = option(
    0.0, "In training U(1-jitter, 1+jitter) multiplies the router's input.", at_least=0, below=1
  )
  every: int = option(
    1, "Of the layers after first_dense, each every-th is an MoE layer.", at_least=1, at_most=64
  )
  first_dense: int = option(0, "Dense layers before the first MoE layer.", at_least=0)
  dense_layers: str = option("", "Dense layers among the others, by index from 0: 3,7.")

  @property
  def shared_width(self) -> int:
    """The hidden width of all shared experts together."""
    return self.shared_experts * (self.shared_dim or self.expert_dim)

  def in_layer(self, layer: int) -> bool:
    """Returns whether a layer, counted from 0, has experts."""
    after = layer + 1 - self.first_dense
    is_dense = str(layer) in self.dense_layers.split(",")
    return bool(self.num_experts) and after > 0 and after % self.every == 0 and not is_dense

  @property
  def renormalizes(self) -> bool:
    """One gate that is scaled to sum to 1 would be constant, and the router would not learn."""
    return self.renormalize and self.top_k > 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling(Section):
  """The stretching of rotary positions, for text longer than the weights were first trained on."""

  kind: RopeKind = option(RopeKind.NONE, "Which wavelengths are stretched.")
  factor: float = option(1.0, "How many times longer they get.", at_least=1)
  original_length: int = option(8192, "yarn, llama3: tokens of a row before.", at_least=1)
  beta_fast: float = option(32.0, "yarn: turns in a row above which none is stretched.", above=0)
  beta_slow: float = option(1.0, "yarn: turns in a row below which all of it is.", above=0)
  truncate: bool = option(True, "yarn: the ramp begins and ends at whole dimensions.")
  attention_factor: float = option(
    0.0, "yarn: multiplies rotated queries and keys; 0 is 0.1 ln(factor) + 1.", at_least=0
  )
  mscale_all_dim: float = option(
    0.0, "yarn: (0.1 * it * ln(factor) + 1)^2 multiplies scores (DeepSeek); 0 is 1.", at_least=0
  )
  low_freq_factor: float = option(1.0, "llama3: turns in a row below which all of it is.", above=0)
  high_freq_factor: float = option(4.0, "llama3: turns above which none is stretched.", above=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Latent(Section):
  """Multi-head latent attention (DeepSeek-V2, 2405.04434): keys and values are made of a latent."""

  kv_dim: int = option(0, "Width of the latent; 0 is attention without latents.", at_least=0)
  query_dim: int = option(0, "Width of a latent of queries; 0 is none.", at_least=0)
  rotary_dim: int = option(
    16, "The last dimensions of head_dim, which are rotated; all heads share a key's.", at_least=1
  )
  value_dim: int = option(32, "Width of a head of values, at most head_dim.", at_least=1)
  norm_eps: float = option(
    1e-6, "Added to the mean square in the RMSNorm of a latent; DeepSeek's is fixed.", above=0
  )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Delta(Section):
  """The gated delta rule (2412.06464) in place of attention, in all but every global_every-th
  layer: a state of constant size instead of a cache of keys and values."""

  value_heads: int = option(0, "Heads of values; 0 is attention in all layers.", at_least=0)
  key_heads: int = option(2, "Heads of queries and keys, a divisor of value_heads.", at_least=1)
  key_dim: int = option(32, "Width of a head of queries and keys.", at_least=1)
  value_dim: int = option(32, "Width of a head of values.", at_least=1)
  conv_width: int = option(4, "Tokens that the convolution before it reads.", at_least=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model(Section):
  """The decoder: RMSNorm, RoPE, grouped-query attention, gated feed-forwards."""

  vocab_size: int = option(
    264, "Rows of the embedding (V). Bytes need 257; the default is a multiple of 8.", at_least=1
  )
  num_layers: int = option(4, "Decoder layers, dense ones and MoE.", at_least=1, at_most=10_000)
  dim: int = option(192, "Width of the residual stream (D).", at_least=1)
  num_heads: int = option(6, "Heads of queries (H).", at_least=1)
  num_kv_heads: int = option(2, "Heads of keys and values (G), a divisor of H.", at_least=1)
  head_dim: int = option(32, "Width of a head (A), even.", at_least=1)
  ffn_dim: int = option(512, "Hidden width of a dense feed-forward (F).", at_least=1)
  rope_base: float = option(10_000.0, "Base of the rotary embedding's wavelengths.", above=0)
  rotary_fraction: float = option(
    1.0,
    "Share of a head's width that is rotated, from its start (GLM-4.5: 0.5).",
    above=0,
    at_most=1,
  )
  rope_interleaved: bool = option(
    False, "A rotated pair is two neighbours, and not a half apart (DeepSeek)."
  )
  rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
  norm_eps: float = option(1e-5, "Added to the mean square in RMSNorm.", above=0)
  norm_offset: bool = option(False, "RMSNorm multiplies by 1 + its parameter (Qwen3-Next).")
  qk_norm: QKNorm = option(QKNorm.NONE, "RMSNorm of queries and keys.")
  qkv_bias: bool = option(False, "Queries, keys and values have biases (Qwen2).")
  out_bias: bool = option(False, "The attention's output has a bias.")
  attention_gate: bool = option(
    False, "The sigmoid of a projection multiplies the attention's output (Qwen3-Next)."
  )
  latent: Latent = dataclasses.field(default_factory=Latent)
  delta: Delta = dataclasses.field(default_factory=Delta)
  window: int = option(
    0, "Tokens that a query attends to, itself the last; 0 is all before it.", at_least=0
  )
  global_every: int = option(
    0, "n: every n-th layer attends, without the window or the delta rule; 0: none.", at_least=0
  )
  soft_cap: float = option(
    0.0,
    "Scores of attention are c * tanh(score / c), with this c (Gemma 2: 50); 0: no cap.",
    at_least=0,
  )
  sinks: bool = option(
    False, "A learned logit of each head joins the softmax of attention (gpt-oss)."
  )
  attention_scale: float = option(
    0.0, "Multiplies the products of queries and keys; 0 is head_dim^-0.5.", at_least=0
  )
  embedding_multiplier: float = option(1.0, "Multiplies the embeddings (Granite: 12).", above=0)
  residual_multiplier: float = option(
    1.0, "Multiplies what a layer adds to the residual stream (Granite: 0.22).", above=0
  )
  logit_multiplier: float = option(1.0, "Multiplies the output logits (Granite: 1/6).", above=0)
  logit_soft_cap: float = option(
    0.0, "Output logits are c * tanh(logit / c), with this c (Gemma 2: 30); 0: no cap.", at_least=0
  )
  activation: Activation = option(
    Activation.SWIGLU, "The nonlinearity of feed-forwards and experts."
  )
  activation_limit: float = option(
    7.0, "clamped_swiglu: the gate is at most this, and up at most this far from 0.", above=0
  )
  tied_head: bool = option(True, "The output matrix is the embedding's transpose.")
  compute_dtype: Dtype = option(
    Dtype.FLOAT32, "Type of activations and matmuls; parameters stay float32."
  )
  remat: Remat = option(Remat.NONE, "What is kept for the backward pass.")
  loss_chunk: int = option(
    0, "Tokens of a device whose output logits are in memory at once; 0: all.", at_least=0
  )
  gradient_sums: GradientSums = option(
    GradientSums.COMPUTE, "Type in which devices add up the gradients of split matrices."
  )
  attention: Attention = option(Attention.AUTO, "The kernel of attention.")
  moe: MoE = dataclasses.field(default_factory=MoE)

  @property
  def rotated_width(self) -> int:
    """The dimensions of a head that are rotated: its first, or its last with a latent."""
    if self.latent.kv_dim:
      return self.latent.rotary_dim
    return int(self.head_dim * self.rotary_fraction)

  @property
  def value_dim(self) -> int:
    """The width of a head of values."""
    return self.latent.value_dim if self.latent.kv_dim else self.head_dim

  @property
  def gated(self) -> bool:
    """Whether feed-forwards have a gate matrix beside up and down."""
    return self.activation not in (Activation.RELU_SQUARED, Activation.GELU)

  @property
  def residual_scale(self) -> float:
    """Of the initial weights that write to the residual stream: its variance stays near 1."""
    return (2 * self.num_layers) ** -0.5
