"""Films and traces: what was played and what the network did to itself, drawn."""
