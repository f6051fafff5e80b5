"""What the logic asks of the world. Each port has one adapter for production and one shipped fake (adapters/memory).
Synchronous, all of it.
"""
