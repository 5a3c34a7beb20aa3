"""Files that are read and written: checkpoints, safetensors, manifests, quantized weights, vocabulary maps, ONNX."""
