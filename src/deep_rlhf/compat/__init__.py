"""Interfaces of other projects over this one."""
