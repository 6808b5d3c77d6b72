"""The networks, as the papers write them down and as they run."""
