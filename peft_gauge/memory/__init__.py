"""The GPU memory of a step: the log of storages, a model of the caching allocator, GPU sizes and CUDA overheads."""
