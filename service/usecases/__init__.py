"""What a caller can ask for, as plain functions: ports in, core objects out."""
