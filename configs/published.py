"""The shapes of published models, by name.

Question   How large are published models, and what does a token of them cost?
           The shapes are those of their config.json, so that `--describe` repeats the published
           parameter counts (tests/model/test_published.py). Training one from scratch needs the
           data and the mesh of your own; `python -m moe_jax.hf import` reads their weights.
Command    python train.py --config=configs/published.py:qwen3_30b_a3b --describe
Hardware   for --describe any
Time       --describe: seconds
Expect     of qwen3_30b_a3b 30.53B parameters, 3.353B active per token
"""

from typing import Any

from moe_jax.config import (
  Activation,
  Config,
  Data,
  Delta,
  Dtype,
  GroupScore,
  Latent,
  Loss,
  Model,
  MoE,
  QKNorm,
  Remat,
  RopeKind,
  RopeScaling,
  Score,
  override,
)


def _model(V: int, L: int, D: int, H: int, G: int, F: int, A: int = 128, **fields) -> Model:
  """Vocabulary, layers, width, heads, key/value heads, width of a dense FFN, width of a head."""
  fields = dict(tied_head=False, compute_dtype=Dtype.BFLOAT16, remat=Remat.FULL) | fields
  return Model(
    vocab_size=V, num_layers=L, dim=D, num_heads=H, num_kv_heads=G, head_dim=A, ffn_dim=F, **fields
  )


def _moe(E: int, K: int, F: int, **fields) -> MoE:
  """Experts, experts of a token, width of an expert."""
  return MoE(num_experts=E, top_k=K, expert_dim=F, **fields)


def _glm(E: int, F: int, **fields) -> MoE:
  return _moe(E, 8, F, score=Score.SIGMOID, shared_experts=1, bias_update_rate=1e-3, **fields)


def _gpt_oss(layers: int, E: int) -> Model:
  yarn = RopeScaling(kind=RopeKind.YARN, factor=32.0, original_length=4096, truncate=False)
  return _model(
    201_088,
    layers,
    2880,
    64,
    8,
    2880,
    64,
    rope_base=150_000.0,
    rope_scaling=yarn,
    window=128,
    global_every=2,
    sinks=True,
    qkv_bias=True,
    out_bias=True,
    activation=Activation.CLAMPED_SWIGLU,
    moe=_moe(E, 4, 2880, expert_bias=True, router_bias=True),
  )


def _yarn(mscale_all_dim: float) -> RopeScaling:
  return RopeScaling(
    kind=RopeKind.YARN,
    factor=40.0,
    original_length=4096,
    attention_factor=1.0,
    mscale_all_dim=mscale_all_dim,
  )


_DEEPSEEK_V2, _DEEPSEEK_V3 = _yarn(0.707), _yarn(1.0)


def _deepseek(
  V: int, L: int, D: int, H: int, F: int, rope: RopeScaling, moe: MoE, query_dim: int = 0, **fields
) -> Model:
  latent = Latent(kv_dim=512, query_dim=query_dim, rotary_dim=64, value_dim=128)
  return _model(
    V,
    L,
    D,
    H,
    H,
    F,
    192,
    latent=latent,
    rope_scaling=rope,
    rope_interleaved=True,
    norm_eps=1e-6,
    moe=moe,
    **fields,
  )


_QWEN_SHARED = dict(renormalize=False, shared_experts=1, shared_gate=True)
_GRANITE = dict(
  tied_head=True,
  rope_base=1e4,
  embedding_multiplier=12.0,
  residual_multiplier=0.22,
  logit_multiplier=1 / 6,
  attention_scale=1 / 64,
)
_LLAMA3 = RopeScaling(kind=RopeKind.LLAMA3, factor=8.0, original_length=8192)

MODELS = {
  "mixtral_8x7b": _model(32_000, 32, 4096, 32, 8, 14_336, rope_base=1e6, moe=_moe(8, 2, 14_336)),
  "mixtral_8x22b": _model(32_768, 56, 6144, 48, 8, 16_384, rope_base=1e6, moe=_moe(8, 2, 16_384)),
  "olmoe_1b_7b": _model(
    50_304, 16, 2048, 16, 16, 1024, qk_norm=QKNorm.WIDTH, moe=_moe(64, 8, 1024, renormalize=False)
  ),
  "qwen1_5_moe_a2_7b": _model(
    151_936, 24, 2048, 16, 16, 5632, qkv_bias=True, rope_base=1e6,
    moe=_moe(60, 4, 1408, shared_dim=5632, **_QWEN_SHARED),
  ),
  "qwen2_57b_a14b": _model(
    151_936, 28, 3584, 28, 4, 18_944, qkv_bias=True, rope_base=1e6,
    moe=_moe(64, 8, 2560, shared_dim=20_480, **_QWEN_SHARED),
  ),
  "qwen3_30b_a3b": _model(
    151_936, 48, 2048, 32, 4, 6144, qk_norm=QKNorm.HEAD, rope_base=1e6, norm_eps=1e-6,
    moe=_moe(128, 8, 768),
  ),
  "qwen3_235b_a22b": _model(
    151_936, 94, 4096, 64, 4, 12_288, qk_norm=QKNorm.HEAD, rope_base=1e6, norm_eps=1e-6,
    moe=_moe(128, 8, 1536),
  ),
  "qwen3_next_80b_a3b": _model(
    151_936, 48, 2048, 16, 2, 5632, 256, qk_norm=QKNorm.HEAD, rope_base=1e7, norm_eps=1e-6,
    rotary_fraction=0.25, attention_gate=True, norm_offset=True, global_every=4,
    delta=Delta(value_heads=32, key_heads=16, key_dim=128, value_dim=128),
    moe=_moe(512, 10, 512, shared_dim=512, shared_experts=1, shared_gate=True),
  ),
  "qwen3_5_35b_a3b": _model(
    248_320, 40, 2048, 16, 2, 512, 256, qk_norm=QKNorm.HEAD, rope_base=1e7, norm_eps=1e-6,
    rotary_fraction=0.25, attention_gate=True, norm_offset=True, global_every=4,
    delta=Delta(value_heads=32, key_heads=16, key_dim=128, value_dim=128),
    moe=_moe(256, 8, 512, shared_dim=512, shared_experts=1, shared_gate=True),
  ),
  "glm_4_5_air": _model(
    151_552, 46, 4096, 96, 8, 10_944, qkv_bias=True, rotary_fraction=0.5, rope_base=1e6,
    moe=_glm(128, 1408, first_dense=1),
  ),
  "glm_4_5": _model(
    151_552, 92, 5120, 96, 8, 12_288, qkv_bias=True, rotary_fraction=0.5, rope_base=1e6,
    qk_norm=QKNorm.HEAD, moe=_glm(160, 1536, first_dense=3, gate_scale=2.5),
  ),
  "deepseek_v2_lite": _deepseek(
    102_400, 27, 2048, 16, 10_944, _DEEPSEEK_V2, _moe(
      64, 6, 1408, shared_experts=2, first_dense=1, renormalize=False),
  ),
  "deepseek_v2": _deepseek(
    102_400, 60, 5120, 128, 12_288, _DEEPSEEK_V2, _moe(
      160, 6, 1536, shared_experts=2, first_dense=1, renormalize=False, gate_scale=16.0,
      expert_groups=8, top_groups=3, group_score=GroupScore.BEST),
    query_dim=1536,
  ),
  "deepseek_v3": _deepseek(
    129_280, 61, 7168, 128, 18_432, _DEEPSEEK_V3,
    _glm(256, 2048, first_dense=3, gate_scale=2.5, expert_groups=8, top_groups=4), query_dim=1536,
  ),
  "moonlight_16b_a3b": _deepseek(
    163_840, 27, 2048, 16, 11_264, RopeScaling(), _moe(
      64, 6, 1408, score=Score.SIGMOID, bias_update_rate=1e-3, shared_experts=2, first_dense=1,
      gate_scale=2.446),
    rope_base=50_000.0,
  ),
  "kimi_k2": _deepseek(
    163_840, 61, 7168, 64, 18_432, _DEEPSEEK_V3,
    _glm(384, 2048, first_dense=1, gate_scale=2.827), query_dim=1536, rope_base=50_000.0,
  ),
  "gpt_oss_20b": _gpt_oss(24, 32),
  "gpt_oss_120b": _gpt_oss(36, 128),
  "minimax_m2": _model(
    200_064, 62, 3072, 48, 8, 1536, rotary_fraction=0.5, rope_base=5e6, qk_norm=QKNorm.WIDTH,
    moe=_moe(256, 8, 1536, score=Score.SIGMOID, bias_update_rate=1e-3),
  ),
  "ernie_4_5_21b_a3b": _model(
    103_424, 28, 2560, 20, 4, 12_288, tied_head=True, rope_base=5e5,
    moe=_moe(64, 6, 1536, shared_experts=2, first_dense=1, bias_update_rate=1e-3),
  ),
  "granite_3_1_1b_a400m": _model(
    49_155, 24, 1024, 16, 8, 512, A=64, moe=_moe(32, 8, 512), **_GRANITE
  ),
  "granite_3_1_3b_a800m": _model(
    49_155, 32, 1536, 24, 8, 512, A=64, moe=_moe(40, 8, 512), **_GRANITE
  ),
  "hunyuan_a13b": _model(
    128_167, 32, 4096, 32, 8, 3072, qk_norm=QKNorm.HEAD, tied_head=True,
    moe=_moe(64, 8, 3072, shared_experts=1),
  ),
  "llama_2_7b": _model(32_000, 32, 4096, 32, 32, 11_008),
  "llama_2_70b": _model(32_000, 80, 8192, 64, 8, 28_672),
  "llama_3_1_8b": _model(128_256, 32, 4096, 32, 8, 14_336, rope_base=5e5, rope_scaling=_LLAMA3),
  "llama_3_1_70b": _model(128_256, 80, 8192, 64, 8, 28_672, rope_base=5e5, rope_scaling=_LLAMA3),
  "mistral_7b": _model(32_000, 32, 4096, 32, 8, 14_336),
  "qwen3_8b": _model(
    151_936, 36, 4096, 32, 8, 12_288, qk_norm=QKNorm.HEAD, rope_base=1e6, norm_eps=1e-6
  ),
}  # fmt: skip


def get_config(name: str = "qwen3_30b_a3b") -> Config:
  """Returns the config of a published model, trained without dropped tokens."""
  if name not in MODELS:
    raise ValueError(f"{name!r} is not one of: {', '.join(MODELS)}")
  model = MODELS[name]
  has_experts = model.moe.num_experts > 0
  by_bias = model.moe.bias_update_rate > 0
  loss = Loss(load_balance=0.001 if has_experts and not by_bias else 0.0, router_z=0.0)
  return Config(model=model, data=Data(seq_len=4096, batch_size=8), loss=loss)


# What a long run of one of them sets, unless its report says otherwise.
PRETRAINING: dict[str, Any] = {
  "data.name": "c4/en",
  "data.tokenizer": "tokenizer.json",
  "data.seq_len": 4096,
  "train.log_every": 10,
  "train.eval_every": 1000,
  "train.checkpoint_every": 1000,
  "eval.batches": 8,
  "eval.final_batches": 64,
}


def on_devices(config: Config, layouts: dict[str, dict[str, Any]], where: str) -> Config:
  """Returns the config with the layout of a word, v5p_128 for --topology=v5p-128."""
  if where not in layouts:
    raise ValueError(f"{where!r} is not one of: {', '.join(layouts)}")
  return override(config, layouts[where])
