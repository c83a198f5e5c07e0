"""Runs as one self-contained HTML file: `document.py` puts it together, `data.py` says what is in it."""
