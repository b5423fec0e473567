"""Fewer entries, fewer channels: passes that prune live here; there is none yet."""
