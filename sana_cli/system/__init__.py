"""The machine: what it has, where the user's files go, and when it is told to stop."""
