"""RL mathematics: pure functions of `[T, B]` tensors."""
