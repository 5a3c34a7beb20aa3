"""The TensorRT backend whole: export a graph, compile it to a plan, plan its memory, load and run it."""
