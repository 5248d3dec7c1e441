"""Mixtral 8x22B

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
  "data.tokenizer": "tokenizer.model",
  "data.seq_len": 4096,
  "data.batch_size": 512,
  "loss.load_balance": 0.01,
  "loss.router_z": 0.001,
  "model.moe.capacity_factor": 1.25,
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
  "v5p_256": {
    "mesh.fsdp": 128,
  },
}


def get_config(where: str = "v5p_256") -> Config:
  config = override(published.get_config("mixtral_8x22b"), RUN)
  return published.on_devices(config, LAYOUTS, where)
