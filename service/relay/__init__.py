"""Carries committed events from the outbox to the bus and to webhooks, in a process of its own."""
