"""OLMoE

Question   TODO
Command    TODO
Hardware   TODO
Time       TODO
Expect     TODO
"""

from typing import Any

from configs import published
from moe_jax.config import Config, override

RUN = {
  "data.name": "c4/en",
  "data.tokenizer": "tokenizer.json",
  "data.seq_len": 4096,
  "data.batch_size": 1024,
  "loss.load_balance": 0.01,
  "loss.router_z": 0.001,
  "model.moe.dispatch": "grouped",
  "optimizer.learning_rate": 4e-4,
  "optimizer.warmup_steps": 2500,
  "train.steps": 1200000,
  "train.log_every": 10,
  "train.eval_every": 1000,
  "train.checkpoint_every": 1000,
  "eval.batches": 8,
  "eval.final_batches": 64,
}
LAYOUTS: dict[str, dict[str, Any]] = {
  "v5p_32": {
    "mesh.fsdp": 16,
    "train.accumulation": 16,
  },
}


def get_config(where: str = "v5p_32") -> Config:
  config = override(published.get_config("olmoe_1b_7b"), RUN)
  return published.on_devices(config, LAYOUTS, where)
