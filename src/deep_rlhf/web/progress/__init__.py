"""The page that shows how training goes."""
