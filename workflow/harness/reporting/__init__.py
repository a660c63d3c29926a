"""Statistics, tables, figures and the page of a study, made from its collected rows alone."""
