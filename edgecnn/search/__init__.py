"""Other ways to quantize a network, tried where the first one is too slow or costs too much accuracy."""
