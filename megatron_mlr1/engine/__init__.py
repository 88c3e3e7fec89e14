"""The one room that imports megatron.training: run, forward step, datasets, metrics."""
