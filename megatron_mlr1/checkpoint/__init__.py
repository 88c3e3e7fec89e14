"""Weights to files and back: names, tensors, Hugging Face, Megatron."""
