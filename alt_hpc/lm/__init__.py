"""Language models: got, loaded, checked, saved, decoded. Knows nothing of runs."""
