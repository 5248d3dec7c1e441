"""Qwen3-30B-A3B

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
  "data.batch_size": 512,
  "loss.load_balance": 0.001,
  "optimizer.learning_rate": 3e-4,
  "optimizer.warmup_steps": 2000,
  "train.steps": 100000,
  "train.log_every": 10,
  "train.eval_every": 1000,
  "train.checkpoint_every": 1000,
  "eval.batches": 8,
  "eval.final_batches": 64,
}
LAYOUTS: dict[str, dict[str, Any]] = {
  "h200_8": {
    "model.moe.capacity_factor": 1.25,
    "mesh.fsdp": 8,
    "train.accumulation": 16,
  },
  "v5e_256": {
    "model.moe.dispatch": "grouped",
    "mesh.fsdp": 256,
    "train.accumulation": 2,
  },
}


def get_config(where: str = "h200_8") -> Config:
  config = override(published.get_config("qwen3_30b_a3b"), RUN)
  return published.on_devices(config, LAYOUTS, where)
