"""From an upload to the event that a consumer reads."""
