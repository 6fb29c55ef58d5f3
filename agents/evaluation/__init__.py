"""Evaluation: playing levels, statistics, comparisons, interventions, recordings, controls."""
