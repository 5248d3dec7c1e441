"""Does an MoE learn faster than a dense model of the same FLOPs per token, and than one as large?

Eight experts, top-2, dropless, against the dense twin of equal FLOPs per token and the dense twin
of equal total parameters, each at its own learning rate. With a constant rate the steps to the
dense model's final loss can be compared; with a cosine the target is reached inside the decay and
the ratio is compressed, so the cosine arms are there for the final loss.

Honest failures: the gap grows with tokens, and under a million bytes an MoE can still lose; a few
megabytes are memorised by the larger model; on a CPU wall-clock says nothing of an accelerator.
"""

from configs.sweeps import parts, tuned
from moe_jax.sweep import Sweep, arm, product


def get_sweep() -> Sweep:
  models = [
    arm("dense", tuned.DENSE, parts.DENSE),
    arm("moe", tuned.TOP2, parts.DROPLESS),
    arm("dense_total", tuned.DENSE_TOTAL, parts.DENSE_TOTAL),
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
