"""Tokens to batches: index, records, tokenizers, preprocessing, mixtures."""
