"""Sweep files of a few arms, and their plans."""

import pathlib
import textwrap

from moe_jax.sweep import plan as plan_lib


def write_sweep(folder, arms, **more):
  fields = "".join(f", {name}={value!r}" for name, value in more.items())
  text = f"""
    '''Is it so?

    Why it could be.
    '''
    from moe_jax.sweep import Sweep, arm, match, product, zipped


    def get_sweep():
      return Sweep(base="configs/debug.py", arms={arms}{fields})
  """
  path = folder / "sweep_file.py"
  path.write_text(textwrap.dedent(text).lstrip())
  return str(path)


def make(path, out="runs/x", *, arms=(), seeds=(), overrides=None, measured=None):
  return plan_lib.make_plan(
    path,
    pathlib.Path(out),
    arms=arms,
    seeds=seeds,
    overrides=overrides or {},
    measured=measured or {},
  )


TWO = "[arm('base'), arm('none', {'loss.load_balance': 0.0})]"
