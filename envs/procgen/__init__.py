"""ProcGen in batches, with chosen levels and true resets."""
