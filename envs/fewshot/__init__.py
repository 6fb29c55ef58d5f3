"""Few-shot episodes: what they show and ask, and answers without learning."""
