"""Interfaces of other libraries, such as TRL 0.7 to 0.11."""
