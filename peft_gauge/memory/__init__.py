"""What a step needs of a GPU's memory: the log of storages, the caching allocator, GPUs, and what CUDA itself takes."""
