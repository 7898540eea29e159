"""Memory plans: how much memory a run needs, computed before anything is loaded."""
