"""Interfaces of other libraries over the parts of this one."""
