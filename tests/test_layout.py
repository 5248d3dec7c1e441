"""The flow of the package: a module imports only what stands before it."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
FLOW = [
  "config", "command_line", "validation", "sharding", "data", "backend", "routers", "dispatch",
  "statistics", "apart", "blocked", "grouped_matmul", "expert_parallel", "feedforward", "moe",
  "attention", "transformer", "inference", "describe", "losses", "metrics", "optimizer", "health",
  "checkpoint", "specialisation", "probe", "evaluate", "examine", "loop", "train",
]  # fmt: skip
# Imported by nobody in the flow.
LEAVES = ["sampling", "generate", "report", "timing", "matching", "sweep", "bench"]


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
    before = FLOW + LEAVES[: LEAVES.index(name)] if name in LEAVES else FLOW[: FLOW.index(name)]
    wrong = imports(path) - set(before) - {name}
    assert not wrong, f"{path.name} imports {wrong}, which stand after it"


def test_reports_need_no_model():
  for path in (ROOT / "moe_jax/report").glob("*.py"):
    # config.py has UserError, and imports no jax.
    model = r"^\s*(?:import|from) (jax|flax|moe_jax)\b(?!\.(?:report|config)\b)"
    assert not re.search(model, path.read_text(), re.M), path


def test_one_file_names_collectives():
  for name, path in modules():
    if name != "expert_parallel":
      assert not re.search(r"lax\.(psum|all_to_all|all_gather|ppermute)", path.read_text()), path


def test_files_stay_readable():
  """A file past some 300 lines is two things. Data and config files have their own folders."""
  for _, path in modules():
    assert len(path.read_text().splitlines()) <= 330, path
