"""How fast drawing is, and how near to what the machine can do."""
