"""The CUDA driver, facts about the GPU, CUDA graphs and kernels; shared by the backends cuda and tensorrt."""
