"""Accounts, passwords and limits of the web page."""
