"""Traces of the CUDA caching allocator: recording, reading, and comparison with the allocations of a plan."""
