"""How a gradient is made and applied: autograd, C or CUDA graphs; devices, streams, non-finite numbers."""
