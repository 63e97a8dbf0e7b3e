"""The values that travel from step to step. Tensors and numbers only: no model, no network."""
