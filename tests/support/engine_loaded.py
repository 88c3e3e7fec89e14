"""Loads all that training needs: a server of Python's `multiprocessing` imports this once.

The processes that it forks have it at once, where a new interpreter needs some ten seconds for it.
"""

import os

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
# CPU mode counts this many devices; a world of a test is not larger.
os.environ["LOCAL_WORLD_SIZE"] = "8"

import torch

from megatron_mlr1 import cpu

torch.set_num_threads(1)  # a pool of threads would not survive a fork
cpu.activate()

import megatron_mlr1.engine.run  # noqa: E402, F401
