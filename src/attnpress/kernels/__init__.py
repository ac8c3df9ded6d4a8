"""Compressed attention as one operation with several backends. Other folders import only `ops`."""
