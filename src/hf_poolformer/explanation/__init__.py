"""Where a classifier looks: class activation maps, and pictures of them."""
