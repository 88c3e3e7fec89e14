"""Sizes to modules: spec, attention, norm, build."""
