"""Answer requests: the engine, the worker with its queue, prefix cache, JSON schemas and cancellation."""
