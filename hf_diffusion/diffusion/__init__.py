"""The mathematics of masked diffusion, with no model in it: pure functions on tensors."""
