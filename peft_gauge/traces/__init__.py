"""Logs of CUDA's caching allocator: read, recorded, and laid beside the allocations that a plan expects."""
