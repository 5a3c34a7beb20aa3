"""What everything on the GPU shares: the driver, facts about the GPU, CUDA graphs and kernels."""
