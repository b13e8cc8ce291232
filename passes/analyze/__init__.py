"""Analysis: what is proven of masks and biases. `structure.analyze` is the way in."""
