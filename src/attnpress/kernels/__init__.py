"""Compressed attention as one operation with several backends; `ops` is the only module that others import."""
