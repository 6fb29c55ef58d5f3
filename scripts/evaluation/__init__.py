"""Evaluating agents from the command line."""
