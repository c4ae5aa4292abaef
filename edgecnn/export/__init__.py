"""From a Program to ONNX and TFLite files, and whether two executions of it agree."""
