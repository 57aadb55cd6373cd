"""The loops for CPU memory, in Numba. Each gives the bytes of the definition that it replaces."""
