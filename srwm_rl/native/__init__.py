"""A policy compiled to C on the CPU."""
