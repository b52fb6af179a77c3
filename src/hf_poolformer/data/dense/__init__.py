"""Images with annotation maps or objects: reading, checking and naming what is annotated."""
