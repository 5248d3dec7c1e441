"""Which learning rate does each kind of model want?

A comparison at one rate favours the arm that the rate suits. Three rates for each kind of model
that the other sweeps compare, one seed that they do not use; the best goes into tuned.py.

Honest failure: a best rate at the edge of the three would ask for more; and one seed separates only
rates that differ by more than about 0.01 nats.
"""

from configs.sweeps import parts
from moe_jax.sweep import Sweep, arm, product


def get_sweep() -> Sweep:
  models = [
    arm("dense", parts.DENSE),
    arm("dense_total", parts.DENSE_TOTAL),
    arm("top2"),
    arm("top1", parts.TOP1),
    arm("sigmoid", parts.DROPLESS, parts.SIGMOID, parts.BIAS),
    arm("fine", parts.FINE),
    arm("expert_choice", parts.EXPERT_CHOICE),
  ]
  rates = [arm(f"lr{rate:g}", {"optimizer.learning_rate": rate}) for rate in (2.5e-3, 5e-3, 1e-2)]
  return Sweep(
    base="configs/lab_moe.py",
    arms=product(models, rates),
    seeds=(9,),
    band="none: this sweep only tunes the others",
  )
