"""The flow of the package: a module imports only what stands before it."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
# What each group may import, besides itself; first what stands alone.
GROUPS = {
  "config": set(),
  "validation": {"config", "moe"},  # the records of routers and dispatchers
  "command_line": {"config"},
  "data": {"config"},
  "sharding": {"config"},
  "startup": {"config", "data"},
  "kernels": {"config", "sharding"},
  "moe": {"config", "sharding", "kernels"},
  "model": {"config", "validation", "sharding", "kernels", "moe"},
}


def imports(path):
  """Modules of the package that a file imports, by their first name."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module == "moe_jax":
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_jax."):
      found.add(node.module.split(".")[1])
    elif isinstance(node, ast.Import):
      found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("moe_jax.")}
  return found


def modules():
  for path in sorted((ROOT / "moe_jax").rglob("*.py")):
    name = path.relative_to(ROOT / "moe_jax").parts[0].removesuffix(".py")
    if name != "__init__":
      yield name, path


def test_imports_point_back():
  for name, path in modules():
    if name in GROUPS:
      wrong = imports(path) - GROUPS[name] - {name}
      assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_reports_need_no_model():
  for path in (ROOT / "moe_jax/report").glob("*.py"):
    # config.py has UserError, and imports no jax.
    model = r"^\s*(?:import|from) (jax|flax|moe_jax)\b(?!\.(?:report|config)\b)"
    assert not re.search(model, path.read_text(), re.M), path


COLLECTIVES = {
  "all_gather", "all_gather_invariant", "all_to_all", "axis_index", "axis_size",
  "pmax", "pmean", "pmin", "ppermute", "pshuffle", "psum", "psum_scatter", "ragged_all_to_all",
}  # fmt: skip


def collectives(path):
  """Names of collectives that a file uses: lax.psum, from jax.lax import psum, parallel.psum."""
  used = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
      used |= {alias.name for alias in node.names}
    elif isinstance(node, ast.Attribute):
      used.add(node.attr)
  return used & COLLECTIVES


def test_one_file_names_collectives():
  seen = {path.name: names for _, path in modules() if (names := collectives(path))}
  assert seen.pop("exchange.py") >= {"psum", "all_gather", "all_to_all", "psum_scatter",
                                     "axis_index", "ragged_all_to_all"}  # fmt: skip
  assert not seen


def test_files_stay_readable():
  """A file past some 300 lines is two things. Data and config files have their own folders."""
  for _, path in modules():
    assert len(path.read_text().splitlines()) <= 330, path
