"""Collecting experience: stepping environments, rollout buffer, unroll queue."""
