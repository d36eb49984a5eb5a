"""ONNX graphs of decoders: traced, packed, fused, and read back."""
