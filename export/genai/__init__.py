"""The folders of ONNX Runtime GenAI: which graph each family gets, and the reader."""
