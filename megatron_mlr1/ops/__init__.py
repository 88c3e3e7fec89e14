"""Mathematics of one device: tensors in, tensors out."""
