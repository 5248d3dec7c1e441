"""Which learning rate is best for each kind of model?

A comparison at one rate favours the arm that the rate suits. This sweep trains each kind of model
that the other sweeps compare at three rates, with one seed that the other sweeps do not use. The
best rate is entered in configs/arms/rates.py.

Possible failures: the best rate may be the lowest or the highest of the three, and then more rates
are needed; one seed separates only rates whose losses differ by more than about 0.01 nats.
"""

from configs.arms import changes
from moe_jax.sweep import Sweep, arm, product


def get_sweep() -> Sweep:
  models = [
    arm("dense", changes.DENSE),
    arm("dense_total", changes.DENSE_TOTAL),
    arm("top2"),
    arm("top1", changes.TOP1),
    arm("sigmoid", changes.DROPLESS, changes.SIGMOID, changes.BIAS),
    arm("fine", changes.FINE),
    arm("expert_choice", changes.EXPERT_CHOICE),
  ]
  rates = [arm(f"lr{rate:g}", {"optimizer.learning_rate": rate}) for rate in (2.5e-3, 5e-3, 1e-2)]
  return Sweep(
    base="configs/lab_moe.py",
    arms=product(models, rates),
    seeds=(9,),
    band="none: this sweep only tunes the others",
  )
