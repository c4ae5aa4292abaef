"""Post-training quantization: the scheme, observers, calibration and the integer reference."""
