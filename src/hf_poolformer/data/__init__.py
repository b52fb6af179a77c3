"""From what people store to batches of images: sources, columns, classes, decoding, the stream and its loader."""
