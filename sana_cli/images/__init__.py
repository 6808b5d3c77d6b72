"""Image files: pixels, metadata, names, masks, and the preview in a terminal."""
