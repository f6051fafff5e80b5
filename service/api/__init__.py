"""Thin HTTP routers over the use cases."""
