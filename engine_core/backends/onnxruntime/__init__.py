"""The CPU backend whole: build an ONNX graph, plan its memory, load and run it with ONNX Runtime."""
