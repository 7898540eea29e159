"""Sources of labels beside the page: simulated annotators, replayed files; and how reliable annotators are."""
