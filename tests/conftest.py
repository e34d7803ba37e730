"""For every test, and every process that a test starts: one thread, since several processes run side by side."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # another number of threads adds in another order, and last bits differ

import torch

torch.set_num_threads(1)
