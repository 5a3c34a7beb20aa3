"""A checkpoint's architecture as data: its ``ModelSpec``, families, RoPE tables and sizes."""
