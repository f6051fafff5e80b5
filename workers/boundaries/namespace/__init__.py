"""A pod in a locked-down namespace of a shared cluster."""
