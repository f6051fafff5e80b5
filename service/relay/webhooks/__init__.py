"""Sends events to webhooks: a process of its own, so that no receiver in the world holds up the stream."""
