"""Folded models as files for other runtimes, checked after writing."""
