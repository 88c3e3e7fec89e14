"""MobileLLM-R1 on Megatron-Core: recipes, data, model, training, conversion."""

__version__ = "0.1.0"
