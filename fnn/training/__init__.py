"""Training: clipping, optimisers that see every block, the compiled step, and `fit`."""
