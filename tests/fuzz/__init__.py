"""Fuzzing of what reads hostile bytes, for as long as one likes; not a part of the tests."""
