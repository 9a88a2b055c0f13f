__version__ = "0.1.0"
"""Of all of Raylift; pyproject.toml takes it from here, and so does whoever needs neither an installation nor other libraries."""
