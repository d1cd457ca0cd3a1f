"""How processes come to life, find each other, and end."""
