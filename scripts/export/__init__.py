"""Agents for other programs: ONNX and Stable-Baselines3 zips."""
