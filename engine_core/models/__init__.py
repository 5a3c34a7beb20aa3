"""What a checkpoint's architecture is: its ``ModelSpec``, families, RoPE tables and sizes."""
