"""A training run: callbacks, metrics, best model, exact state."""
