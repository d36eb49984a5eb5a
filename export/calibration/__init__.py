"""Post-training quantization with calibration text: lattices that every writer keeps."""
