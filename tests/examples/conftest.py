from digits import digits  # noqa: F401
