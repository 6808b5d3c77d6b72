"""From what is asked for to recipes, and from many rows to a folder of pictures."""
