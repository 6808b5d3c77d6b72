"""Pictures as files: what they hold, what they are called, and how they look in a terminal."""
