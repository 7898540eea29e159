"""Rendering: templates, Markdown and error pages."""
