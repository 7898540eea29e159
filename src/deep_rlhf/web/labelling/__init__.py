"""The labelling tab: questions and labels."""
