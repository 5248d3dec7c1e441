"""The sizes of the models in the `train` and `decode` benchmarks, ours and the peers'."""

W = dict(
  vocab_size=256, dim=256, layers=4, heads=8, kv_heads=4, experts_count=8, top_k=2, expert_dim=512,
  seq_len=256, batch_size=16, seed=0,
)  # fmt: skip
