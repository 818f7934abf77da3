"""Microbenchmarks for a reader: tables in the terminal, and one HTML file with plots.

``terminal`` needs rich and ``page`` needs matplotlib; each is imported when a command asks for it.
"""
