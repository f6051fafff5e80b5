"""Pure logic: no sockets, no sleeping, seconds in all."""
