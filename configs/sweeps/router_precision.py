"""Does the router need float32, and which growth does the router z-loss limit?

The router's product and softmax are computed in bfloat16 or float32, with and without the z-loss
(2202.08906 eq. 5); everything else is float32.

Possible failure: the published divergences are those of large models and will not show here. What
can show is that without the z-loss the logits grow, measured as the mean squared logsumexp.
"""

from configs.arms import changes, rates
from moe_jax.sweep import Sweep, arm, product


def get_sweep() -> Sweep:
  precision = [arm(d, {"model.moe.router_dtype": d}) for d in ("float32", "bfloat16")]
  z_loss = [arm("z0", {"loss.router_z": 0.0}), arm("z1e-3", {"loss.router_z": 1e-3})]
  common = [arm("top2", rates.TOP2, changes.DROPLESS)]
  return Sweep(
    base="configs/lab_moe.py",
    arms=product(common, precision, z_loss),
    target="top2-float32-z1e-3",
    published=(
      "bfloat16 router diverges, float32 -1.716 (Switch 2101.03961 table 2); with z-loss 3 of 3 "
      "runs stable, without 4 of 6 (ST-MoE 2202.08906 table 4)"
    ),
    band=(
      "no divergence; all losses within 0.01; router z below 3 with the z-loss, above 6 without it"
    ),
  )
