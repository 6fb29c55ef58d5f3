"""Films of an agent that plays, and recordings of it."""
