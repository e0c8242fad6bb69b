"""Numbers: what a format is, and how a value gets into one. Tensors in, tensors out, no models."""
