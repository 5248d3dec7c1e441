"""Weights of Hugging Face checkpoints, in and out: python -m moe_jax.hf import|export|check."""
