"""The pages: a file for each program, with all of its fields."""
