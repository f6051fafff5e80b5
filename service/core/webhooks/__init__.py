"""Webhooks: to whom events are sent, where they may go, what an answer means, and when to try again. All of it pure."""
