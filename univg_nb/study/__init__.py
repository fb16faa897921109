"""The study behind the claims of the course.

`design` reads which arms, seeds and items there are; `arms` trains one arm with one
seed and lets it answer the test; `power` computes how many seeds and items it takes;
`outcomes` collects, judges and reports; `command` is the command line.
"""
