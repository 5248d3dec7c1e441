"""Changes of configs/lab_moe.py that the arms of several sweeps in configs/sweeps/ share."""

from moe_jax.sweep import match

DROPLESS = {"model.moe.dispatch": "grouped"}
NO_BALANCE = {"loss.load_balance": 0.0}
BIAS = NO_BALANCE | {"model.moe.bias_update_rate": 1e-3}
SIGMOID = {"model.moe.score": "sigmoid"}
EXPERT_CHOICE = NO_BALANCE | {
  "model.moe.router": "expert_choice",
  "model.moe.renormalize": False,
  "model.moe.capacity_factor": 1.0,
  "model.moe.eval_capacity_factor": 1.0,
}
TOP1 = match("moe", by="flops_per_token", top_k=1)
FINE = match("moe", by="flops_per_token", num_experts=64, top_k=8)
DENSE = match("dense", by="flops_per_token")
DENSE_TOTAL = match("dense", by="total_params")
