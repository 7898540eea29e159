"""The model tab: how training proceeds."""
