"""What a run has come to: measures, results, the table, the curves."""
