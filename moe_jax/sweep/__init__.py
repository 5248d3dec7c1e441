"""Sweeps: plans the runs of a question (language, plan) and runs them (runner, job, slots).

Sweep files import the names below.
"""

from moe_jax.sweep.language import Arm, Sweep, arm, product, zipped
from moe_jax.sweep.matching import match

__all__ = ["Arm", "Sweep", "arm", "match", "product", "zipped"]
