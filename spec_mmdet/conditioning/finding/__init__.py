"""Find the query, key and value projections of a model."""
