"""The CUDA backend whole: build the weights of an engine directory, plan its memory, load and run it."""
