"""The studies behind the claims of the course.

`reference` trains over several seeds, `data` makes what it learns from, and `tables`
compares the results.
"""
