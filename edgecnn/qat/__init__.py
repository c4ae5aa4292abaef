"""Quantization-aware training: the one training loop on a network that rounds as its files will."""
