"""This project and TRL at the same job: what the jobs are, how they are prepared, measured, counted and compared.

`jobs` and `measure` are imported by both sides, so they need nothing but the standard library and psutil.
"""
