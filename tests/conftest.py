"""For every test: one thread a process, since several processes run side by side."""

import torch

torch.set_num_threads(1)
