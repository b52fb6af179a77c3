"""Checkpoints of others, in and out: what their files hold, which architecture that is, and whose names."""
