"""Does an MoE learn faster than a dense model of equal FLOPs per token, or of equal size?

Eight experts, top-2, dropless, are compared with the dense twin of equal FLOPs per token and with
the dense twin of equal total parameters, each at its own learning rate. The arms with a constant
rate compare the steps to the dense model's final loss. With a cosine schedule that loss is reached
while the rate decays, which makes the ratio of steps smaller, so the cosine arms compare the final
losses.

Possible failures: the gap grows with tokens, and under a million bytes an MoE can still lose; the
larger model memorises a few megabytes; times on a CPU say nothing about an accelerator.
"""

from configs.arms import changes, rates
from moe_jax.sweep import Sweep, arm, product


def get_sweep() -> Sweep:
  models = [
    arm("dense", rates.DENSE, changes.DENSE),
    arm("moe", rates.TOP2, changes.DROPLESS),
    arm("dense_total", rates.DENSE_TOTAL, changes.DENSE_TOTAL),
  ]
  schedules = [
    arm("constant", {"optimizer.schedule": "constant", "train.eval_every": 40}),
    arm("cosine"),
  ]
  return Sweep(
    base="configs/lab_moe.py",
    arms=product(models, schedules),
    target="dense-constant",
    published=(
      "7.5x fewer steps at equal FLOPs (Switch-Base against T5-Base, 2101.03961), about 3x fewer "
      "tokens and 2x less time (OLMoE 2409.02060)"
    ),
    band=(
      "moe-cosine minus dense-cosine between -0.03 and -0.07 nats per byte; moe-constant reaches "
      "dense-constant's final loss in 1.3 to 1.8 times fewer steps; dense_total is better than moe"
    ),
  )
