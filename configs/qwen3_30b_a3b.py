"""Qwen3-30B-A3B (2505.09388): 48 layers, d 2048, 128 experts of 768, top-8.

Question   What does a fine-grained MoE cost on a node of GPUs, and on a slice of small TPUs? The
           paper gives a sequence of 4,096 and a balance loss over the global batch, and neither
           batch nor learning rate. Experts have slots for 1.25 times the load. XLA's grouped matmul
           for GPUs is one array of all experts by all rows: 128 GiB for a layer of this model. On a
           host with tokamax's kernels add --config.model.moe.dispatch=grouped.
Command    python -m moe_jax.compile --config=configs/qwen3_30b_a3b.py:h200_8 --topology=h200-8
           python -m moe_jax.compile --config=configs/qwen3_30b_a3b.py:v5e_256 --topology=v5e-256
Hardware   h200_8: one host of 8 H200 (fsdp 8, 16 microbatches of 4 rows on each), 103.2 of 131.3
           GiB. The compiler finds that too much and repeats collectives to save memory: it scatters
           some gradients five times. Float32 logits of 16,384 x 151,936 take most of it
           v5e_256: 256 chips (fsdp 16 x expert 16, 2 microbatches of a row on each), 7.3 of 16 GiB
Time       to compile on 2 CPU cores: h200_8 246 s, v5e_256 210 CPU-seconds. Predicted, not
           measured, of a step of 2.1M tokens: h200_8 18.8 s, MFU at most 32.5%, bound by memory
           (compute takes 11.9 s); v5e_256 8.13 s, 11.8%, of which it waits 5.0 s for rows. Shapes
           alone rank fsdp 256 without drops first, at 2.70 s; compiled, that takes 13.4 s, 7.2%
Expect     30.53B parameters, 3.353B active per token; never trained
"""

from typing import Any

from configs import published
from moe_jax.config import Config, override

RUN = published.PRETRAINING | {
  "data.batch_size": 512,
  "loss.load_balance": 0.001,
  "model.moe.capacity_factor": 1.25,
  "optimizer.learning_rate": 3e-4,
  "optimizer.warmup_steps": 2000,
  "train.steps": 100000,
}
LAYOUTS: dict[str, dict[str, Any]] = {
  "h200_8": {
    "mesh.fsdp": 8,
    "train.accumulation": 16,
  },
  "v5e_256": {
    "mesh.fsdp": 16,
    "mesh.expert": 16,
    "train.accumulation": 2,
  },
}


def get_config(where: str = "h200_8") -> Config:
  config = override(published.get_config("qwen3_30b_a3b"), RUN)
  return published.on_devices(config, LAYOUTS, where)
