"""Sources of labels other than the web page, and how reliable an annotator is."""
