"""Mixtral 8x22B: 56 layers, d 6144, 8 experts of 16384, top-2, 48 heads on 8.

Question   How does Mixtral 8x7B's recipe scale to three times the size? Nothing is published of
           its training, so slots for 1.25 times the load, the balance loss and the learning rate
           are those of configs/mixtral_8x7b.py, with twice its batch.
Command    python -m moe_jax.compile --config=configs/mixtral_8x22b.py:v5p_256 --topology=v5p-256
Hardware   v5p_256: 128 chips (fsdp 128), on each of which the compiler reserves 54.8 of 95 GiB
Time       to compile on 2 CPU cores: 484 s. Predicted, not measured: 15.4 s a step of 2.1M tokens,
           MFU at most 56.2%, bound by the compiler's estimate
Expect     140.6B parameters, 39.16B active per token; never trained
"""

from typing import Any

from configs import published
from moe_jax.config import Config, override

RUN = published.PRETRAINING | {
  "data.tokenizer": "tokenizer.model",
  "data.batch_size": 512,
  "loss.load_balance": 0.01,
  "loss.router_z": 0.001,
  "model.moe.capacity_factor": 1.25,
  "optimizer.learning_rate": 3e-4,
  "optimizer.warmup_steps": 2000,
  "train.steps": 100000,
}
LAYOUTS: dict[str, dict[str, Any]] = {
  "v5p_256": {
    "mesh.fsdp": 128,
  },
}


def get_config(where: str = "v5p_256") -> Config:
  config = override(published.get_config("mixtral_8x22b"), RUN)
  return published.on_devices(config, LAYOUTS, where)
