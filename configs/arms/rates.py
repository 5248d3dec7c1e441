"""The learning rate of each kind of arm: the best of three in configs/sweeps/learning_rate.py.

Seed 9, which no other sweep uses.

Validation loss in nats per byte at 2.5e-3, 5e-3 and 1e-2:

  dense          1.321  1.293  1.310
  dense_total    1.290  1.277  1.303
  top2           1.307  1.293  1.300
  top1           1.350  1.341  1.333
  sigmoid        1.297  1.275  1.293
  fine           1.310  1.287  1.280
  expert_choice  1.298  1.287  1.296

top1 and fine are best at the highest rate tried.
"""

DENSE = {"optimizer.learning_rate": 5e-3}
DENSE_TOTAL = {"optimizer.learning_rate": 5e-3}
TOP2 = {"optimizer.learning_rate": 5e-3}
TOP1 = {"optimizer.learning_rate": 1e-2}
SIGMOID = {"optimizer.learning_rate": 5e-3}
FINE = {"optimizer.learning_rate": 1e-2}
EXPERT_CHOICE = {"optimizer.learning_rate": 5e-3}
