"""Runs as files that others run: ONNX, torch and Keras, without this library."""
