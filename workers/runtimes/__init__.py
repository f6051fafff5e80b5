"""Root filesystems that an operator offers by name, in a store of ours."""
