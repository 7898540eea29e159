"""The same jobs in this project and in TRL: settings, preparation, measurement, operation counts and comparison.

`jobs` and `measure` are imported by both sides, so they need the standard library and psutil alone.
"""
