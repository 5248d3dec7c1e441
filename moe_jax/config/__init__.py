"""What a run is: its fields, their words, and what must agree. Imports no jax.

The names of a config file stand here; all else is imported from its module.
"""

from moe_jax.config.choices import (
  Activation,
  Attention,
  BalanceScope,
  Dispatch,
  Dtype,
  Exchange,
  ExchangeFallback,
  GradientSums,
  GroupedMatmul,
  GroupScore,
  OnAlarm,
  OnNonfinite,
  OptimizerName,
  Priority,
  QKNorm,
  Remat,
  RopeKind,
  Router,
  Schedule,
  Score,
)
from moe_jax.config.model import Delta, Latent, Model, MoE, RopeScaling
from moe_jax.config.run import Config, Data, Eval, Health, Loss, Mesh, Optimizer, Train, override
