"""Everything that speaks HTTP, both ends: the server, the typed client and the command line."""
