"""The last judge of labels: what models actually retrained on other texts lose and gain."""
