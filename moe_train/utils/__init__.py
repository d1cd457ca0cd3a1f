"""Small tools that need the standard library alone."""
