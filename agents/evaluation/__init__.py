"""Evaluation: playing levels, statistics, interventions, recordings, supervised parity."""
