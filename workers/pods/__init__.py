"""A pod of ours in whatever cluster: how it is made with its walls, what is shown of them, and how it is used."""
