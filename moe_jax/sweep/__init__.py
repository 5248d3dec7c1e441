"""Sweeps: from a question to its runs (language, plan), and the runs to their end (runner, slots).

A sweep file imports from here what it is written in.
"""

from moe_jax.sweep.language import Arm, Sweep, arm, product, zipped
from moe_jax.sweep.matching import match

__all__ = ["Arm", "Sweep", "arm", "match", "product", "zipped"]
