"""The voice: one command a file, one renderer for tables and JSON."""
