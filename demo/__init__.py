"""The demo: a searchable index of everything that is installed in this venv."""
