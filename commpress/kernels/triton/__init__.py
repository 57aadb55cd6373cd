"""The kernels for CUDA memory, in Triton. Each gives the bytes of the definition that it replaces."""
