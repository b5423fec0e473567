"""Fewer bits: codecs for single factors, and codes under one budget over a whole adapter."""
