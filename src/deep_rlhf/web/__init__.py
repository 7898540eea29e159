"""The page on which people compare answers and watch the model change; it meets the trainer in the store alone."""
