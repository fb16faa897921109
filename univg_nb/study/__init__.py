"""The studies behind the claims of the course.

`reference` trains over several seeds, `data` makes what it learns from, `tables`
compares the results, and `readme` puts them into README.md.
"""
