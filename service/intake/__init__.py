"""Hostile bytes to values we trust: archives are judged before anything is written, documents before they are read."""
