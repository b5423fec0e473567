"""Adapters in ONNX models: slots in an existing graph, `.onnx_adapter` files, graphs that decode codes."""
