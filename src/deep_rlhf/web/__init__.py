"""The web page: labelling, training progress, and access control."""
